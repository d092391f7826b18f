/* A stand-in for libnvidia-ml.so.1, for tests on machines without a GPU.
 *
 * It answers the calls that lightning_gpuorch makes through pynvml, with values of a text file named by the environment
 * variable FAKE_NVML_STATE (read again whenever it changes). Each line is "<scope> <key> <value>":
 *
 *     driver gpus 4                            number of GPUs
 *     *      temperature 45                    every GPU
 *     1      temperature 60..95@3              GPU 1: from 60 to 95 within 3 seconds of the file's last change
 *     1      lost 1                            every call about GPU 1 returns NVML_ERROR_GPU_IS_LOST
 *     1      return:nvmlDeviceGetPowerUsage 999    this call returns that code
 *     *      delay:nvmlDeviceGetPowerUsage 1500    this call takes that many milliseconds ("delay:*": every call)
 *     2      field:230 1                       a value of nvmlDeviceGetFieldValues
 *
 * A GPU's own line beats that of "*"; a later line beats an earlier one. A sensor that no line names, or whose value is
 * "none", is not supported, as on a GPU that lacks it. XID events are lines "<gpu> <xid>" appended to the file of the same name plus ".xids".
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef uint32_t nvml_return;
enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    VERSION_MISMATCH = 25,
};
enum { MAX_GPUS = 16, MAX_LINES = 512, TEXT = 96, EVENT_XID = 8 };
enum { SCOPE_DRIVER = -2, SCOPE_ALL = -1 };

typedef struct { int index; } Device;
typedef struct { uint64_t registered[MAX_GPUS]; long offset; } EventSet;
typedef struct { Device *device; uint64_t type, data; uint32_t gpu_instance, compute_instance; } EventData;
typedef struct { uint32_t gpu, memory; } Utilization;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } MemoryV2;
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_usec;
    uint32_t type;
    nvml_return code;
    union { double real; uint64_t integer; } value;
} FieldValue;
typedef struct {
    char legacy_id[16];
    uint32_t domain, bus, device, device_id, subsystem_id;
    char id[32];
} PciInfo;
typedef struct { int scope; char key[TEXT], value[TEXT]; } Line;

static pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;
static Line lines[MAX_LINES];
static int num_lines;
static struct stat loaded_stat;
static double loaded_at;
static Device devices[MAX_GPUS];
static int initialized;

/* ---- the state file ---- */

static double now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static const char *state_path(void) { return getenv("FAKE_NVML_STATE"); }

static void reload_if_changed(void) {
    struct stat current;
    char text[2 * TEXT], scope[TEXT];
    const char *path = state_path();
    FILE *file;
    if (!path || stat(path, &current) != 0) return; /* between two versions: the old one holds */
    if (current.st_ino == loaded_stat.st_ino && current.st_mtim.tv_sec == loaded_stat.st_mtim.tv_sec &&
        current.st_mtim.tv_nsec == loaded_stat.st_mtim.tv_nsec)
        return;
    file = fopen(path, "r");
    if (!file) return;
    for (num_lines = 0; num_lines < MAX_LINES && fgets(text, sizeof text, file);) {
        Line *line = &lines[num_lines];
        if (sscanf(text, "%95s %95s %95s", scope, line->key, line->value) != 3 || scope[0] == '#') continue;
        line->scope = !strcmp(scope, "driver") ? SCOPE_DRIVER : !strcmp(scope, "*") ? SCOPE_ALL : atoi(scope);
        num_lines++;
    }
    fclose(file);
    loaded_stat = current;
    loaded_at = now_seconds();
}

/* Finds the value of a key; returns 0 if no line names it. */
static int look_up(int scope, const char *key, char value[TEXT]) {
    int best = -1;
    pthread_mutex_lock(&state_lock);
    reload_if_changed();
    for (int i = 0; i < num_lines; i++) {
        int own = lines[i].scope == scope, shared = scope >= 0 && lines[i].scope == SCOPE_ALL;
        if (strcmp(lines[i].key, key) != 0 || !(own || shared)) continue;
        if (own || best < 0 || lines[best].scope == SCOPE_ALL) best = i;
    }
    if (best >= 0 && !strcmp(lines[best].value, "none")) best = -1;
    if (best >= 0) strcpy(value, lines[best].value);
    pthread_mutex_unlock(&state_lock);
    return best >= 0;
}

static int look_up_number(int scope, const char *key, double *number) {
    char value[TEXT], *dots, *at;
    if (!look_up(scope, key, value)) return 0;
    *number = !strncmp(value, "0x", 2) ? (double)strtoull(value, NULL, 16) : strtod(value, NULL);
    dots = strstr(value, "..");
    at = strchr(value, '@');
    if (dots && at) {
        double share = (now_seconds() - loaded_at) / strtod(at + 1, NULL);
        *number += (strtod(dots + 2, NULL) - *number) * (share < 1 ? share : 1);
    }
    return 1;
}

static double number_or(int scope, const char *key, double fallback) {
    double number;
    return look_up_number(scope, key, &number) ? number : fallback;
}

static int num_gpus(void) {
    int count = (int)number_or(SCOPE_DRIVER, "gpus", 0);
    return count < 0 ? 0 : count > MAX_GPUS ? MAX_GPUS : count;
}

/* What every call about a device does first: the injected delay, the injected code, the lost GPU. */
static nvml_return enter(const char *function, const Device *device) {
    char key[TEXT];
    double milliseconds, code;
    if (!initialized) return UNINITIALIZED;
    if (device < devices || device >= devices + MAX_GPUS) return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "delay:%s", function);
    milliseconds = number_or(device->index, key, number_or(device->index, "delay:*", 0));
    if (milliseconds > 0) usleep((useconds_t)(milliseconds * 1000));
    snprintf(key, sizeof key, "return:%s", function);
    code = number_or(device->index, key, SUCCESS);
    if (code != SUCCESS) return (nvml_return)code;
    return number_or(device->index, "lost", 0) != 0 ? GPU_IS_LOST : SUCCESS;
}

#define ENTER(device)                                     \
    do {                                                  \
        nvml_return entered_ = enter(__func__, (device)); \
        if (entered_ != SUCCESS) return entered_;         \
    } while (0)

#define SENSOR(function, type, key)                                             \
    nvml_return function(Device *device, type *result) {                        \
        double number;                                                          \
        ENTER(device);                                                          \
        if (!look_up_number(device->index, key, &number)) return NOT_SUPPORTED; \
        *result = (type)number;                                                 \
        return SUCCESS;                                                         \
    }

static nvml_return copy_text(char *target, uint32_t size, const char *text) {
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

/* ---- the library ---- */

nvml_return nvmlInitWithFlags(uint32_t flags) {
    double code = number_or(SCOPE_DRIVER, "return:nvmlInit", SUCCESS);
    double milliseconds = number_or(SCOPE_DRIVER, "delay:nvmlInit", 0);
    (void)flags;
    if (milliseconds > 0) usleep((useconds_t)(milliseconds * 1000));
    if (!state_path()) return DRIVER_NOT_LOADED;
    if (code != SUCCESS) return (nvml_return)code;
    for (int i = 0; i < MAX_GPUS; i++) devices[i].index = i;
    __sync_add_and_fetch(&initialized, 1);
    return SUCCESS;
}
nvml_return nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvml_return nvmlShutdown(void) {
    if (!initialized) return UNINITIALIZED;
    __sync_sub_and_fetch(&initialized, 1);
    return SUCCESS;
}
const char *nvmlErrorString(nvml_return code) {
    static __thread char text[32];
    snprintf(text, sizeof text, "fake NVML error %u", code);
    return text;
}
nvml_return nvmlSystemGetDriverVersion(char *text, uint32_t size) {
    char value[TEXT];
    if (!initialized) return UNINITIALIZED;
    return copy_text(text, size, look_up(SCOPE_DRIVER, "version", value) ? value : "570.86.15");
}
nvml_return nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = (int)number_or(SCOPE_DRIVER, "cuda", 12080);
    return initialized ? SUCCESS : UNINITIALIZED;
}

/* ---- which GPU is which ---- */

static void uuid_of(int gpu, char text[TEXT]) {
    if (!look_up(gpu, "uuid", text)) snprintf(text, TEXT, "GPU-00000000-0000-0000-0000-%012d", gpu);
}
static void bus_id_of(int gpu, char text[TEXT]) {
    if (!look_up(gpu, "bus_id", text)) snprintf(text, TEXT, "00000000:%02X:00.0", 0x10 * (gpu + 1));
}
nvml_return nvmlDeviceGetCount_v2(uint32_t *count) {
    *count = (uint32_t)num_gpus();
    return initialized ? SUCCESS : UNINITIALIZED;
}
nvml_return nvmlDeviceGetHandleByIndex_v2(uint32_t index, Device **device) {
    if (!initialized) return UNINITIALIZED;
    if ((int)index >= num_gpus()) return INVALID_ARGUMENT;
    *device = &devices[index];
    return enter(__func__, *device);
}
nvml_return nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    char text[TEXT];
    if (!initialized) return UNINITIALIZED;
    for (int i = 0; i < num_gpus(); i++) {
        uuid_of(i, text);
        if (strcmp(text, uuid) != 0) continue;
        *device = &devices[i];
        return enter(__func__, *device);
    }
    return NOT_FOUND;
}
nvml_return nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Device **device) {
    unsigned wanted[3], have[3];
    char text[TEXT];
    if (!initialized) return UNINITIALIZED;
    if (sscanf(bus_id, "%x:%x:%x", &wanted[0], &wanted[1], &wanted[2]) != 3) return INVALID_ARGUMENT;
    for (int i = 0; i < num_gpus(); i++) {
        bus_id_of(i, text);
        if (sscanf(text, "%x:%x:%x", &have[0], &have[1], &have[2]) != 3 || memcmp(wanted, have, sizeof have) != 0) continue;
        *device = &devices[i];
        return enter(__func__, *device);
    }
    return NOT_FOUND;
}
nvml_return nvmlDeviceGetIndex(Device *device, uint32_t *index) {
    ENTER(device);
    *index = (uint32_t)device->index;
    return SUCCESS;
}
nvml_return nvmlDeviceGetName(Device *device, char *text, uint32_t size) {
    char value[TEXT];
    ENTER(device);
    return copy_text(text, size, look_up(device->index, "name", value) ? value : "Fake-GPU");
}
nvml_return nvmlDeviceGetUUID(Device *device, char *text, uint32_t size) {
    char value[TEXT];
    ENTER(device);
    uuid_of(device->index, value);
    return copy_text(text, size, value);
}
nvml_return nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info) {
    char value[TEXT];
    ENTER(device);
    bus_id_of(device->index, value);
    memset(info, 0, sizeof *info);
    sscanf(value, "%x:%x:%x", &info->domain, &info->bus, &info->device);
    snprintf(info->id, sizeof info->id, "%.31s", value);
    return SUCCESS;
}

/* ---- sensors ---- */

nvml_return nvmlDeviceGetTemperature(Device *device, uint32_t sensor, uint32_t *celsius) {
    double number;
    ENTER(device);
    if (sensor != 0 || !look_up_number(device->index, "temperature", &number)) return NOT_SUPPORTED;
    *celsius = (uint32_t)number;
    return SUCCESS;
}
nvml_return nvmlDeviceGetTemperatureThreshold(Device *device, uint32_t threshold, uint32_t *celsius) {
    static const char *const keys[] = {"temperature_shutdown", "temperature_slowdown"};
    double number;
    ENTER(device);
    if (threshold > 1 || !look_up_number(device->index, keys[threshold], &number)) return NOT_SUPPORTED;
    *celsius = (uint32_t)number;
    return SUCCESS;
}
SENSOR(nvmlDeviceGetPowerUsage, uint32_t, "power_milliwatts")
SENSOR(nvmlDeviceGetEnforcedPowerLimit, uint32_t, "power_limit_milliwatts")
SENSOR(nvmlDeviceGetCurrentClocksEventReasons, uint64_t, "clock_event_reasons")
SENSOR(nvmlDeviceGetPcieReplayCounter, uint32_t, "pcie_replays")
SENSOR(nvmlDeviceGetRetiredPagesPendingStatus, uint32_t, "retirement_pending")
nvml_return nvmlDeviceGetClockInfo(Device *device, uint32_t type, uint32_t *megahertz) {
    double number;
    ENTER(device);
    if (type != 1 || !look_up_number(device->index, "sm_clock_megahertz", &number)) return NOT_SUPPORTED;
    *megahertz = (uint32_t)number;
    return SUCCESS;
}
nvml_return nvmlDeviceGetUtilizationRates(Device *device, Utilization *percent) {
    double number;
    ENTER(device);
    if (!look_up_number(device->index, "utilization_percent", &number)) return NOT_SUPPORTED;
    percent->gpu = percent->memory = (uint32_t)number;
    return SUCCESS;
}
nvml_return nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    double total;
    ENTER(device);
    if (memory->version != 0x2000028u) return VERSION_MISMATCH;
    if (!look_up_number(device->index, "memory_total", &total)) return NOT_SUPPORTED;
    memory->total = (uint64_t)total;
    memory->used = (uint64_t)number_or(device->index, "memory_used", 0);
    memory->reserved = (uint64_t)number_or(device->index, "memory_reserved", 0);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}
nvml_return nvmlDeviceGetTotalEccErrors(Device *device, uint32_t uncorrected, uint32_t aggregate, uint64_t *count) {
    double number;
    ENTER(device);
    if (uncorrected != 1 || aggregate != 0 || !look_up_number(device->index, "ecc_uncorrected", &number))
        return NOT_SUPPORTED;
    *count = (uint64_t)number;
    return SUCCESS;
}
nvml_return nvmlDeviceGetRemappedRows(Device *device, uint32_t *corrected, uint32_t *uncorrected, uint32_t *pending,
                                      uint32_t *failure) {
    double number;
    ENTER(device);
    if (!look_up_number(device->index, "remap_pending", &number)) return NOT_SUPPORTED;
    *pending = (uint32_t)number;
    *failure = (uint32_t)number_or(device->index, "remap_failure", 0);
    *corrected = *uncorrected = 0;
    return SUCCESS;
}
nvml_return nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *values) {
    char key[TEXT];
    ENTER(device);
    for (int i = 0; i < count; i++) {
        double number = 0;
        snprintf(key, sizeof key, "field:%u", values[i].field);
        values[i].code = look_up_number(device->index, key, &number) ? SUCCESS : NOT_SUPPORTED;
        values[i].type = 1; /* unsigned int */
        values[i].value.integer = (uint64_t)number;
    }
    return SUCCESS;
}
/* Both about a pair: what the second of the two says. */
nvml_return nvmlDeviceGetTopologyCommonAncestor(Device *device, Device *other, uint32_t *level) {
    ENTER(device);
    *level = (uint32_t)number_or(other->index, "topology", 10);
    return SUCCESS;
}
nvml_return nvmlDeviceGetP2PStatus(Device *device, Device *other, uint32_t capability, uint32_t *status) {
    ENTER(device);
    (void)capability;
    *status = (uint32_t)number_or(other->index, "p2p", 0);
    return SUCCESS;
}
nvml_return nvmlDeviceGetNvLinkState(Device *device, uint32_t link, uint32_t *up) {
    char key[TEXT];
    ENTER(device);
    if (link >= number_or(device->index, "nvlinks", 0)) return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "nvlink:%u", link);
    *up = (uint32_t)number_or(device->index, key, 1);
    return SUCCESS;
}

/* ---- events ---- */

nvml_return nvmlEventSetCreate(EventSet **set) {
    if (!initialized) return UNINITIALIZED;
    *set = calloc(1, sizeof **set);
    return SUCCESS;
}
nvml_return nvmlEventSetFree(EventSet *set) {
    free(set);
    return SUCCESS;
}
nvml_return nvmlDeviceGetSupportedEventTypes(Device *device, uint64_t *types) {
    ENTER(device);
    *types = (uint64_t)number_or(device->index, "event_types", 0x1f);
    return SUCCESS;
}
nvml_return nvmlDeviceRegisterEvents(Device *device, uint64_t types, EventSet *set) {
    ENTER(device);
    if (types & ~(uint64_t)number_or(device->index, "event_types", 0x1f)) return NOT_SUPPORTED;
    set->registered[device->index] |= types;
    return SUCCESS;
}
static int next_xid(EventSet *set, EventData *event) {
    char path[4096], text[64];
    int gpu, found = 0;
    unsigned long long xid;
    FILE *file;
    snprintf(path, sizeof path, "%s.xids", state_path());
    file = fopen(path, "r");
    if (!file) return 0;
    fseek(file, set->offset, SEEK_SET);
    while (!found && fgets(text, sizeof text, file) && strchr(text, '\n')) {
        set->offset = ftell(file);
        found = sscanf(text, "%d %llu", &gpu, &xid) == 2 && gpu >= 0 && gpu < MAX_GPUS &&
                (set->registered[gpu] & EVENT_XID);
    }
    fclose(file);
    if (found) *event = (EventData){&devices[gpu], EVENT_XID, xid, UINT32_MAX, UINT32_MAX};
    return found;
}
nvml_return nvmlEventSetWait_v2(EventSet *set, EventData *event, uint32_t milliseconds) {
    double deadline = now_seconds() + milliseconds / 1000.0;
    while (initialized) {
        if (next_xid(set, event)) return SUCCESS;
        for (int i = 0; i < num_gpus(); i++) /* as a real driver does once a GPU has fallen off the bus */
            if (set->registered[i] && number_or(i, "lost", 0) != 0) return GPU_IS_LOST;
        if (now_seconds() >= deadline) return TIMEOUT;
        usleep(5000);
    }
    return UNINITIALIZED;
}
