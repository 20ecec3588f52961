#version 450
// Plain colours under ambient light and one directional light: no textures, no shadows, no reflections.
// A software renderer compiles this in a fraction of the time that SAPIEN's own shaders take.
// The uniform blocks are the renderer's interface (SAPIEN 3.0).

layout(set = 0, binding = 0) uniform CameraBuffer {
  mat4 viewMatrix;
  mat4 projectionMatrix;
  mat4 viewMatrixInverse;
  mat4 projectionMatrixInverse;
  float width;
  float height;
} cameraBuffer;

layout(set = 2, binding = 0) uniform MaterialBuffer {
  vec4 emission;
  vec4 baseColor;
  float fresnel;
  float roughness;
  float metallic;
  float transmission;
  float ior;
  float transmissionRoughness;
  int textureMask;
  int padding1;
  vec4 textureTransforms[6];
} materialBuffer;

struct PointLight {
  vec4 position;
  vec4 emission;
};

struct DirectionalLight {
  vec4 direction;
  vec4 emission;
};

struct SpotLight {
  vec4 position;
  vec4 direction;
  vec4 emission;
};

layout(set = 3, binding = 0) uniform SceneBuffer {
  vec4 ambientLight;
  PointLight pointLights[10];
  DirectionalLight directionalLights[3];
  SpotLight spotLights[10];
  SpotLight texturedLights[1];
} sceneBuffer;

layout(location = 0) in vec3 worldNormal;

layout(location = 0) out vec4 outColor;

const float PI = 3.14159265;
const float DISPLAY_GAMMA = 2.2;

void main() {
  DirectionalLight sun = sceneBuffer.directionalLights[0];
  float facing = max(dot(normalize(worldNormal), -normalize(sun.direction.xyz)), 0.0);
  vec3 light = sceneBuffer.ambientLight.rgb + sun.emission.rgb * facing / PI;
  vec3 color = materialBuffer.baseColor.rgb * light;
  outColor = vec4(pow(clamp(color, 0.0, 1.0), vec3(1.0 / DISPLAY_GAMMA)), 1.0);
}
