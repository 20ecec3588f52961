#version 450
// The lighting of SAPIEN's default shaders (Lambert and GGX, ambient light, directional lights without shadows) in one
// pass instead of five, and the number of the actor in 8 bits instead of four more pictures. Colours are cut off as the
// original does. What is marked as flat is to be covered by a photograph and is not shaded at all.
// The uniform blocks are the renderer's interface (SAPIEN 3.0).

layout(constant_id = 0) const int NUM_DIRECTIONAL_LIGHTS = 3;

layout(set = 0, binding = 0) uniform CameraBuffer {
  mat4 viewMatrix;
  mat4 projectionMatrix;
  mat4 viewMatrixInverse;
  mat4 projectionMatrixInverse;
  float width;
  float height;
} cameraBuffer;

layout(set = 1, binding = 0) uniform ObjectTransformBuffer {
  mat4 modelMatrix;
} objectTransformBuffer;

layout(set = 1, binding = 1) uniform ObjectDataBuffer {
  uvec4 segmentation;
  float transparency;
  int shadeFlat;
} objectDataBuffer;

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

layout(set = 2, binding = 1) uniform sampler2D colorTexture;
layout(set = 2, binding = 2) uniform sampler2D roughnessTexture;
layout(set = 2, binding = 3) uniform sampler2D normalTexture;
layout(set = 2, binding = 4) uniform sampler2D metallicTexture;
layout(set = 2, binding = 5) uniform sampler2D emissionTexture;

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

layout(location = 0) in vec3 cameraPosition;
layout(location = 1) in vec2 textureUV;
layout(location = 2) in vec3 cameraNormal;
layout(location = 3) in vec3 cameraTangent;
layout(location = 4) in vec3 cameraBitangent;

layout(location = 0) out vec4 outColor;
layout(location = 1) out vec4 outActor;

const float PI = 3.14159265;
const float DISPLAY_GAMMA = 2.2;
const int COLOR = 1, ROUGHNESS = 2, NORMAL = 4, METALLIC = 8, EMISSION = 16;

bool has(int texture_) { return (materialBuffer.textureMask & texture_) != 0; }

vec2 at(int slot) {
  vec4 transform = materialBuffer.textureTransforms[slot];
  return textureUV * transform.zw + transform.xy;
}

vec3 shadingNormal() {
  vec3 n = normalize(cameraNormal);
  if (has(NORMAL) && dot(cameraTangent, cameraTangent) > 0.0) {
    vec3 bump = texture(normalTexture, at(2)).xyz * 2.0 - 1.0;
    n = normalize(mat3(normalize(cameraTangent), normalize(cameraBitangent), n) * bump);
  }
  return dot(n, cameraPosition) < 0.0 ? n : -n;
}

// GGX with Schlick's approximations, as SAPIEN has it.
vec3 gloss(float nl, float nv, float nh, float vh, float roughness, vec3 fresnel) {
  float alpha = roughness * roughness;
  float squared = alpha * alpha;
  float k = (alpha + 2.0 * roughness + 1.0) / 8.0;
  vec3 reflected = fresnel + (1.0 - fresnel) * exp2((-5.55473 * vh - 6.98316) * vh);
  float facets = nh * nh * (squared - 1.0) + 1.0;
  float below = 4.0 * PI * facets * facets * (nv * (1.0 - k) + k) * (nl * (1.0 - k) + k);
  return reflected * squared / clamp(below, 1e-6, 4.0 * PI) * nl;
}

void main() {
  outColor = vec4(0.0, 0.0, 0.0, 1.0);
  outActor = vec4(float(objectDataBuffer.segmentation.y) / 255.0, 0.0, 0.0, 1.0);
  if (objectDataBuffer.shadeFlat != 0) {
    return;
  }
  vec4 albedo = has(COLOR) ? texture(colorTexture, at(0)) : materialBuffer.baseColor;
  if (albedo.a == 0.0) {
    discard;
  }
  float roughness = has(ROUGHNESS) ? texture(roughnessTexture, at(1)).r : materialBuffer.roughness;
  float metallic = has(METALLIC) ? texture(metallicTexture, at(3)).r : materialBuffer.metallic;
  vec4 emission = materialBuffer.emission;
  if (has(EMISSION)) {
    emission.rgb *= texture(emissionTexture, at(4)).rgb;
  }
  vec3 diffuse = albedo.rgb * (1.0 - metallic);
  vec3 fresnel = materialBuffer.fresnel * 0.08 * (1.0 - metallic) + albedo.rgb * metallic;

  vec3 n = shadingNormal();
  vec3 view = -normalize(cameraPosition);
  float nv = clamp(dot(n, view), 1e-6, 1.0);
  vec3 color = emission.rgb * emission.a + sceneBuffer.ambientLight.rgb * albedo.rgb;
  for (int i = 0; i < NUM_DIRECTIONAL_LIGHTS; ++i) {
    vec3 light = -(mat3(cameraBuffer.viewMatrix) * sceneBuffer.directionalLights[i].direction.xyz);
    vec3 halfway = light + view;
    halfway = dot(halfway, halfway) < 1e-6 ? vec3(0.0) : normalize(halfway);
    float nl = clamp(dot(n, light), 0.0, 1.0);
    float nh = clamp(dot(n, halfway), 1e-6, 1.0);
    float vh = clamp(dot(view, halfway), 1e-6, 1.0);
    color += sceneBuffer.directionalLights[i].emission.rgb
           * (diffuse * nl / PI + gloss(nl, nv, nh, vh, roughness, fresnel));
  }
  vec3 shown = pow(clamp(color, 0.0, 1.0), vec3(1.0 / DISPLAY_GAMMA));
  outColor.rgb = floor(shown * 255.0) / 255.0;
}
