/* A Vulkan layer: takes VK_KHR_external_semaphore_fd off what a program asks of a device that does not have it.
 *
 * SAPIEN 2 asks for the extension always and needs it only to share images with CUDA. Mesa's CPU driver lacks it. The
 * structures are those of vulkan.h and vk_layer.h, cut down to what is read, so that no Vulkan headers are needed. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INITIALIZATION_FAILED = -3, LINK_INFO = 0, LOADER_INSTANCE = 47, LOADER_DEVICE = 48 };

typedef void (*Function)(void);
typedef Function (*Lookup)(void *, const char *);
typedef struct Chained { int type; const struct Chained *next; } Chained;
typedef struct InstanceLink { struct InstanceLink *next; Lookup instance_function, physical_function; } InstanceLink;
typedef struct DeviceLink { struct DeviceLink *next; Lookup instance_function, device_function; } DeviceLink;
typedef struct { int type; const void *next; int kind; void *link; } LayerInfo;
typedef struct { char name[256]; uint32_t version; } Extension;
typedef struct {
    int type; const void *next; uint32_t flags, queues; const void *queue_infos;
    uint32_t layers; const char *const *layer_names; uint32_t extensions; const char *const *extension_names;
    const void *features;
} DeviceInfo;
typedef struct { int type; void *next; uint32_t version; Lookup instance_function, device_function, physical_function; }
    Negotiation;

static const char *const OPTIONAL = "VK_KHR_external_semaphore_fd";
static Lookup next_instance_function, next_device_function;
static void *instance;

static LayerInfo *link_of(const void *info, int type) {
    for (const Chained *at = ((const Chained *)info)->next; at; at = at->next)
        if (at->type == type && ((const LayerInfo *)at)->kind == LINK_INFO) return (LayerInfo *)at;
    return NULL;
}

static int create_instance(const void *info, const void *allocator, void **made) {
    LayerInfo *layer = link_of(info, LOADER_INSTANCE);
    if (!layer) return INITIALIZATION_FAILED;
    InstanceLink *link = layer->link;
    layer->link = link->next;
    next_instance_function = link->instance_function;
    int result = ((int (*)(const void *, const void *, void **))next_instance_function(NULL, "vkCreateInstance"))(
        info, allocator, made);
    if (result == SUCCESS) instance = *made;
    return result;
}

static int has(void *physical_device, const char *name) {
    typedef int (*Enumerate)(void *, const char *, uint32_t *, Extension *);
    Enumerate enumerate = (Enumerate)next_instance_function(instance, "vkEnumerateDeviceExtensionProperties");
    uint32_t count = 0;
    if (enumerate(physical_device, NULL, &count, NULL) != SUCCESS) return 0;
    Extension *known = calloc(count + 1, sizeof *known);
    int found = 0;
    if (known && enumerate(physical_device, NULL, &count, known) == SUCCESS)
        for (uint32_t i = 0; i < count; i++) found |= !strcmp(known[i].name, name);
    free(known);
    return found;
}

static int create_device(void *physical_device, const DeviceInfo *asked, const void *allocator, void **made) {
    LayerInfo *layer = link_of(asked, LOADER_DEVICE);
    if (!layer) return INITIALIZATION_FAILED;
    DeviceLink *link = layer->link;
    layer->link = link->next;
    next_device_function = link->device_function;
    DeviceInfo info = *asked;
    const char **kept = calloc(asked->extensions + 1, sizeof *kept);
    if (!kept) return INITIALIZATION_FAILED;
    info.extensions = 0;
    info.extension_names = kept;
    for (uint32_t i = 0; i < asked->extensions; i++)
        if (strcmp(asked->extension_names[i], OPTIONAL) || has(physical_device, OPTIONAL))
            kept[info.extensions++] = asked->extension_names[i];
    Function create = link->instance_function(instance, "vkCreateDevice");
    int result = ((int (*)(void *, const DeviceInfo *, const void *, void **))create)(
        physical_device, &info, allocator, made);
    free(kept);
    return result;
}

static Function device_function(void *device, const char *name) {
    if (!strcmp(name, "vkGetDeviceProcAddr")) return (Function)device_function;
    return next_device_function(device, name);
}

static Function instance_function(void *of, const char *name) {
    if (!strcmp(name, "vkCreateInstance")) return (Function)create_instance;
    if (!strcmp(name, "vkCreateDevice")) return (Function)create_device;
    if (!strcmp(name, "vkGetInstanceProcAddr")) return (Function)instance_function;
    if (!strcmp(name, "vkGetDeviceProcAddr")) return (Function)device_function;
    return next_instance_function ? next_instance_function(of, name) : NULL;
}

int vkNegotiateLoaderLayerInterfaceVersion(Negotiation *with) {
    with->version = 2;
    with->instance_function = instance_function;
    with->device_function = device_function;
    with->physical_function = NULL;
    return SUCCESS;
}
