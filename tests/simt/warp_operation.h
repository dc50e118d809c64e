// warp_operation.h: operations of a whole warp, and 16-bit numbers.
#pragma once
#include <cstring>

#include "runtime.h"

namespace simt {

// Every lane of `mask` must come to the same operation; the last one carries it out for all (`combine` gets each
// lane's args), and all continue.
template <class Args>
void warp_operation(void* pc, uint32_t mask, const char* op, int line, Args& args,
                    void (*combine)(Args** lanes, uint32_t mask)) {
  Thread& t = *current;
  const int base = t.index & ~31;
  const int lanes = launch.threads - base < 32 ? launch.threads - base : 32;
  if (lanes < 32) mask &= (1u << lanes) - 1;  // lanes that the block does not have
  if (!(mask >> (t.index - base) & 1)) fault(pc, nullptr, "%s with mask %08x, in which this lane is not", op, mask);
  t.line = line, t.mask = mask, t.op = op, t.args = &args;
  Args* all[32] = {};
  for (int l = 0; l < lanes; l++) {
    if (!(mask >> l & 1)) continue;
    Thread& o = threads[base + l];
    if (o.state == State::done)
      fault(pc, nullptr, "%s at line %d names lane %d in its mask, which has returned", op, line, l);
    if (&o != &t && o.state != State::warp) return park(State::warp);  // who comes last looks at all
    if (&o != &t && (o.mask != mask || o.line != line || o.op != op))
      fault(pc, nullptr, "divergent warp: %s at line %d (mask %08x) while lane %d waits in %s at line %d (mask %08x)",
            op, line, mask, l, o.op, o.line, o.mask);
    all[l] = (Args*)o.args;
  }
  combine(all, mask);
  for (int l = 0; l < lanes; l++)
    if (mask >> l & 1) make_ready(threads[base + l]);
  park(State::ready);
}

inline float widen(uint16_t bits, bool bf16) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
  float f;
  if (!bf16 && magnitude < 0x400) {
    f = float(int(magnitude)) * 0x1p-24f;  // a subnormal: no slow arithmetic with subnormals of float
    return sign ? -f : f;
  }
  const uint32_t half = (magnitude << 13) + ((magnitude < 0x7C00 ? 112u : 224u) << 23);  // exponents of bias 15; 31: NaN
  const uint32_t u = bf16 ? uint32_t(bits) << 16 : sign | half;
  return memcpy(&f, &u, 4), f;
}
}  // namespace simt
