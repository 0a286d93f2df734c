#include "kernels.h"

#define KVC_LANES 4

namespace kvc {
namespace cpu {
namespace portable {
#include "loops.inl"
}  // namespace portable

const Kernels kPortable = {"portable", portable::score, portable::copy};

}  // namespace cpu
}  // namespace kvc
