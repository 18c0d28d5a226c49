// The CPU kernels for one level: any CPU.
#include <cmath>
#include <cstring>

#include "kernels.h"

#define SSD_LEVEL baseline
#include "kernels.inc"

namespace ssd {
const Kernels& baseline_kernels() { return baseline::kLevel; }
}  // namespace ssd
