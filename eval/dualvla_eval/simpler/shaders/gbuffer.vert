#version 450
// Camera-space positions and normals for gbuffer.frag. The uniform blocks are the renderer's interface (SAPIEN 3.0).

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

layout(location = 0) in vec3 position;
layout(location = 1) in vec3 normal;
layout(location = 2) in vec2 uv;
layout(location = 3) in vec3 tangent;
layout(location = 4) in vec3 bitangent;

layout(location = 0) out vec3 cameraPosition;
layout(location = 1) out vec2 textureUV;
layout(location = 2) out vec3 cameraNormal;
layout(location = 3) out vec3 cameraTangent;
layout(location = 4) out vec3 cameraBitangent;

void main() {
  mat4 modelView = cameraBuffer.viewMatrix * objectTransformBuffer.modelMatrix;
  vec4 placed = modelView * vec4(position, 1.0);
  mat3 turn = mat3(modelView);  // every shape here is scaled evenly, if at all
  cameraPosition = placed.xyz;
  textureUV = uv;
  cameraNormal = normalize(turn * normal);
  cameraTangent = turn * tangent;
  cameraBitangent = turn * bitangent;
  gl_Position = cameraBuffer.projectionMatrix * placed;
}
