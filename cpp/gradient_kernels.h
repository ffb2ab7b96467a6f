// The loops of gradient_sum.cpp, which includes this text once per ISA: no include guard.
//
// Expects, inside a namespace of the ISA's own:
//     SUM_TARGET   attribute that allows the ISA's instructions in one function
//     SUM_BYTES    bytes in a vector: 16 on any machine, 32 for AVX2 with F16C, 64 for AVX-512
// and the types Float16, BFloat16, Store, Node, Kernels.
//
// Why text and not templates: an attribute cannot be a template parameter, and a function without
// the attribute cannot inline one that has it.  Why not one file per ISA compiled with -mavx2: any
// inline function of a standard header that it shares with other files might be linked from there,
// and stop a machine without AVX2.  For the same reason nothing from std:: is called below.

#define SUM_INLINE SUM_TARGET __attribute__((always_inline)) static inline
// Unrolling eightfold buys nothing where memory is the limit, and these loops exist many times.
#if defined(__clang__)
#define SUM_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define SUM_NO_UNROLL _Pragma("GCC unroll 1")
#endif

typedef float F32 __attribute__((vector_size(SUM_BYTES)));
typedef double F64 __attribute__((vector_size(SUM_BYTES)));
typedef std::uint32_t U32 __attribute__((vector_size(SUM_BYTES)));
typedef std::uint16_t U16 __attribute__((vector_size(SUM_BYTES / 2)));

// Each step of the loops exists for a vector of elements and, for the ends of a range, for one.
struct Wide {};
struct Single {};

#if SUM_BYTES == 64
inline constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Half-precision values in 32-bit lanes, vector or scalar.  Finite and infinite ones convert as
// F16C does; NaN payloads may differ, as canonical() drops them anyway.

template <class F, class U>
SUM_INLINE F widen_half(U half) {
  const U magnitude = half & 0x7fffu;
  // Subnormal: put the fraction under a leading one worth 2^-14, then take the one away.
  const F tiny = __builtin_bit_cast(F, (magnitude << 13) + 0x38800000u) - 0x1p-14f;
  const U rebias = (magnitude << 13) + 0x38000000u;  // exponent bias 15 -> 127
  const U normal = magnitude >= 0x7c00u ? rebias + 0x38000000u : rebias;
  const U bits = magnitude < 0x0400u ? __builtin_bit_cast(U, tiny) : normal;
  return __builtin_bit_cast(F, bits | (half & 0x8000u) << 16);
}

template <class U, class F>
SUM_INLINE U narrow_half(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U magnitude = bits & 0x7fffffffu;
  // Subnormal: beside 0.5 the last place is worth 2^-24, so the addition does the rounding.
  const F tiny = __builtin_bit_cast(F, magnitude) + 0.5f;
  U half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  half = magnitude >= 0x477ff000u ? U{} + 0x7c00u : half;  // 65520 and more: infinite
  half = magnitude > 0x7f800000u ? U{} + 0x7e00u : half;
  half = magnitude < 0x38800000u ? __builtin_bit_cast(U, tiny) - 0x3f000000u : half;
  return half | (bits >> 16 & 0x8000u);
}

template <class U, class F>
SUM_INLINE U narrow_bfloat(F value) {  // a NaN must be canonical, or the carry might make it finite
  const U bits = __builtin_bit_cast(U, value);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// load: one vector, or one element, in the type that it is added in.

template <class V>
SUM_INLINE V load_bytes(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

SUM_INLINE F32 load(Wide, const float* from) { return load_bytes<F32>(from); }
SUM_INLINE F64 load(Wide, const double* from) { return load_bytes<F64>(from); }
SUM_INLINE F32 load(Wide, const BFloat16* from) {
#if SUM_BYTES == 64
  // The zero-masking forms, here and below: GCC warns of its own header in the plain ones.
  const U32 bits =
      __builtin_bit_cast(U32, _mm512_maskz_cvtepu16_epi32(kAllLanes, load_bytes<__m256i>(from)));
#elif SUM_BYTES == 32
  const U32 bits = __builtin_bit_cast(U32, _mm256_cvtepu16_epi32(load_bytes<__m128i>(from)));
#else
  const U32 bits = __builtin_convertvector(load_bytes<U16>(from), U32);
#endif
  return __builtin_bit_cast(F32, bits << 16);
}
SUM_INLINE F32 load(Wide, const Float16* from) {
#if SUM_BYTES == 64
  return _mm512_maskz_cvtph_ps(kAllLanes, load_bytes<__m256i>(from));
#elif SUM_BYTES == 32
  return _mm256_cvtph_ps(load_bytes<__m128i>(from));
#else
  return widen_half<F32>(__builtin_convertvector(load_bytes<U16>(from), U32));
#endif
}
SUM_INLINE float load(Single, const float* from) { return *from; }
SUM_INLINE double load(Single, const double* from) { return *from; }
SUM_INLINE float load(Single, const BFloat16* from) {
  return __builtin_bit_cast(float, std::uint32_t{from->bits} << 16);
}
SUM_INLINE float load(Single, const Float16* from) {
  return widen_half<float>(std::uint32_t{from->bits});
}

// rounded: a sum in the bits of the tensor's type.  (The pointer only names the type.)

SUM_INLINE F32 rounded(const float*, F32 value) { return value; }
SUM_INLINE F64 rounded(const double*, F64 value) { return value; }
SUM_INLINE U16 rounded(const BFloat16*, F32 value) {
  return __builtin_convertvector(narrow_bfloat<U32>(value), U16);
}
SUM_INLINE U16 rounded(const Float16*, F32 value) {
#if SUM_BYTES == 64
  return __builtin_bit_cast(U16,
                            _mm512_maskz_cvtps_ph(kAllLanes, value, _MM_FROUND_TO_NEAREST_INT));
#elif SUM_BYTES == 32
  return __builtin_bit_cast(U16, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  return __builtin_convertvector(narrow_half<U32>(value), U16);
#endif
}
SUM_INLINE float rounded(const float*, float value) { return value; }
SUM_INLINE double rounded(const double*, double value) { return value; }
SUM_INLINE BFloat16 rounded(const BFloat16*, float value) {
  return {static_cast<std::uint16_t>(narrow_bfloat<std::uint32_t>(value))};
}
SUM_INLINE Float16 rounded(const Float16*, float value) {
  return {static_cast<std::uint16_t>(narrow_half<std::uint32_t>(value))};
}

template <class V>
SUM_INLINE V canonical(V value) {
  return value == value ? value : V{} + __builtin_nanf("");
}

/// A store that does not read the line into the cache first.
template <class V>
SUM_INLINE void stream(void* to, V value) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 8) {
    _mm_stream_si64(static_cast<long long*>(to), __builtin_bit_cast(long long, value));
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(to), __builtin_bit_cast(__m128i, value));
#if SUM_BYTES >= 32
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(to), __builtin_bit_cast(__m256i, value));
#endif
#if SUM_BYTES >= 64
  } else if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(to), __builtin_bit_cast(__m512i, value));
#endif
  } else
#endif
  {
    __builtin_memcpy(to, &value, sizeof value);
  }
}

template <class Lanes, class Src>
SUM_INLINE auto quad(Lanes lanes, const Src* const* child, std::size_t i) {
  return (load(lanes, child[0] + i) + load(lanes, child[1] + i)) +
         (load(lanes, child[2] + i) + load(lanes, child[3] + i));
}

/// One vector, or one element, at i: the rounding, the store.
template <Store kStore, class Dst, class V>
SUM_INLINE void finish(Dst* out, std::size_t i, V sum) {
  const auto value = rounded(out, canonical(sum));
  if constexpr (kStore == Store::stream && sizeof value != sizeof(Dst)) {
    stream(out + i, value);
  } else {
    __builtin_memcpy(out + i, &value, sizeof value);
  }
}

template <Store kStore, class Lanes, class Src, class Dst>
SUM_INLINE void step(Lanes lanes, const Src* const* child, Dst* out, std::size_t i) {
  const auto front = quad(lanes, child, i) + quad(lanes, child + 4, i);
  finish<kStore>(out, i, front + quad(lanes, child + 8, i));
}

template <Store kStore, class Src, class Dst, class Acc>
SUM_INLINE void sum_block(const Src* const* children, Dst* out, std::size_t n) {
  constexpr std::size_t kLanes = SUM_BYTES / sizeof(Acc);
  const Src* child[kKissing];  // a copy that no store can change: stays in registers
  for (int k = 0; k < kKissing; ++k) child[k] = children[k];
  std::size_t i = 0;
  if constexpr (kStore != Store::stream) {
    // Large tensors often start at the same offset in a page.  Twelve lines of such streams do not
    // fit in one set of an 8-way cache; four do, so a run of each quad comes before the next.  What
    // is streamed comes from memory anyway, where one loop over all twelve is faster.
    constexpr std::size_t kRunVectors = 512 / SUM_BYTES;
    constexpr std::size_t kRun = kRunVectors * kLanes;
    for (; i + kRun <= n; i += kRun) {
      decltype(load(Wide{}, child[0])) first[kRunVectors], second[kRunVectors];
      SUM_NO_UNROLL
      for (std::size_t v = 0; v < kRunVectors; ++v) {
        first[v] = quad(Wide{}, child, i + v * kLanes);
      }
      SUM_NO_UNROLL
      for (std::size_t v = 0; v < kRunVectors; ++v) {
        second[v] = quad(Wide{}, child + 4, i + v * kLanes);
      }
      SUM_NO_UNROLL
      for (std::size_t v = 0; v < kRunVectors; ++v) {
        const auto third = quad(Wide{}, child + 8, i + v * kLanes);
        finish<kStore>(out, i + v * kLanes, (first[v] + second[v]) + third);
      }
    }
  }
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    step<kStore>(Wide{}, child, out, i);
    step<kStore>(Wide{}, child, out, i + kLanes);
  }
  if (i + kLanes <= n) {
    step<kStore>(Wide{}, child, out, i);
    i += kLanes;
  }
  for (; i < n; ++i) step<kStore>(Single{}, child, out, i);
}

template <Store kStore, class Src, class Dst, class Acc>
SUM_TARGET void sum_node(const Node& node) {
  constexpr std::size_t kVector = SUM_BYTES / sizeof(Acc) * sizeof(Dst);
  const Src* child[kKissing];
  std::size_t advances[kKissing];  // all ones, or zero for the block of -0.0
  std::size_t limit = node.n;
  for (int k = 0; k < kKissing; ++k) {
    const bool present = node.children[k] != nullptr;
    child[k] = present ? static_cast<const Src*>(node.children[k]) : AbsentBlock<Src>::data;
    advances[k] = present ? ~std::size_t{0} : 0;
    if (!present) limit = kAbsentElements;
  }
  auto* out = static_cast<Dst*>(node.out);
  std::size_t n = node.n;
  if constexpr (kStore == Store::stream) {  // the first part ends where out is aligned
    const std::size_t past = reinterpret_cast<std::uintptr_t>(out) % kVector;
    if (past != 0) n = (kVector - past) / sizeof(Dst);
  }
  for (std::size_t left = node.n; left != 0; left -= n, n = left) {
    if (n > limit) n = limit;
    if (n > left) n = left;
    sum_block<kStore, Src, Dst, Acc>(child, out, n);
    for (int k = 0; k < kKissing; ++k) child[k] += n & advances[k];
    out += n;
  }
}

inline constexpr Kernels kKernels = {
    // In the order of DType.
    .leaves_to_out = {sum_node<Store::plain, float, float, float>,
                      sum_node<Store::plain, double, double, double>,
                      sum_node<Store::plain, BFloat16, BFloat16, float>,
                      sum_node<Store::plain, Float16, Float16, float>},
    .leaves_streamed_out = {sum_node<Store::stream, float, float, float>,
                            sum_node<Store::stream, double, double, double>,
                            sum_node<Store::stream, BFloat16, BFloat16, float>,
                            sum_node<Store::stream, Float16, Float16, float>},
    .leaves_to_sums = {sum_node<Store::plain, float, float, float>,
                       sum_node<Store::plain, double, double, double>,
                       sum_node<Store::plain, BFloat16, float, float>,
                       sum_node<Store::plain, Float16, float, float>},
    .sums_to_out = {sum_node<Store::plain, float, float, float>,
                    sum_node<Store::plain, double, double, double>,
                    sum_node<Store::plain, float, BFloat16, float>,
                    sum_node<Store::plain, float, Float16, float>},
    .sums_to_sums = {sum_node<Store::plain, float, float, float>,
                     sum_node<Store::plain, double, double, double>,
                     sum_node<Store::plain, float, float, float>,
                     sum_node<Store::plain, float, float, float>},
};

#undef SUM_INLINE
#undef SUM_NO_UNROLL
