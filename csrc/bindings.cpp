// The Python module `vllm_kvcompress.transport._codec`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "codec/section.h"

namespace nb = nanobind;
using namespace kvc;

namespace {

template <class T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Profile = std::optional<In<uint16_t, 3>>;
using Records = std::optional<In<uint8_t, 3>>;

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

// Runs work(i) for i in [0, n) on up to `threads` threads; each makes its own worker.
template <class MakeWork>
void spread(size_t n, int threads, MakeWork make_work) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex lock;
  auto run = [&] {
    try {
      auto work = make_work();
      for (size_t i; (i = next++) < n;) work(i);
    } catch (...) {
      std::lock_guard<std::mutex> hold(lock);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads && size_t(i) < n; ++i) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

Shape checked_shape(size_t tokens, size_t channels, int dtype, size_t itemsize) {
  require(dtype >= 0 && dtype <= 2, "dtype must be 0 (bf16), 1 (fp16) or 2 (fp32)");
  require(itemsize == dtype_bytes(Dtype(dtype)), "the array's items are not of that dtype's size");
  require(tokens >= 1 && tokens <= size_t(kMaxTokens), "a chunk has 1 to 32767 tokens");
  require(channels >= 1 && channels <= 65535, "a section has 1 to 65535 channels");
  require(tokens * channels <= size_t(1) << 26, "a section has at most 2^26 values");
  return {int(tokens), int(channels), Dtype(dtype)};
}

class Codec {
 public:
  Codec(In<uint16_t, 3> frequencies, In<uint16_t, 3> spreads, const std::string& isa)
      : kernels_(kernels_named(isa.c_str())) {
    require(kernels_, "this machine has no such instruction set");
    require(frequencies.shape(0) == 2 && frequencies.shape(1) == kTables &&
                frequencies.shape(2) == kSymbols && spreads.shape(0) == 2 &&
                spreads.shape(1) == kOffsets && spreads.shape(2) == kSpreads,
            "a codebook is [2, 256, 32] frequencies and [2, 5, 24] spreads");
    book_ = make_codebook(frequencies.data(), spreads.data());
    require(bool(book_), "the codebook has a table that does not add up");
  }

  std::string isa() const { return kernels_->name; }

  nb::tuple encode(Values values, int dtype, In<uint8_t, 1> quantisers, In<float, 1> parameters,
                   bool relative, Profile frequencies, Records channels, int threads) const {
    const size_t sections = values.shape(0);
    const Shape shape =
        checked_shape(values.shape(1), values.shape(2), dtype, values.itemsize());
    require(quantisers.shape(0) == sections && parameters.shape(0) == sections,
            "one quantiser and one parameter per section");
    for (size_t i = 0; i < sections; ++i) {
      require(quantisers(i) <= 2, "a quantiser is 0 (fixed step), 1 (per token) or 2 (lossless)");
      const float p = parameters(i);
      require(quantisers(i) != 0 || (p > 0 && p < 1e30f), "a step must be positive");
      require(quantisers(i) != 1 || (p >= 1 && p <= kReach && p == float(int(p))),
              "half the bins must be 1 to 15");
    }
    check_profile(frequencies, channels, sections, shape);
    std::vector<std::vector<uint8_t>> parts(sections);
    const size_t record_bytes = sections * shape.channels * sizeof(Channel);
    auto* records = new uint8_t[record_bytes];
    nb::capsule owner(records, [](void* p) noexcept { delete[] (uint8_t*)p; });
    {
      nb::gil_scoped_release release;
      const char* x = (const char*)values.data();
      const size_t size = size_t(shape.tokens) * shape.channels * dtype_bytes(shape.dtype);
      spread(sections, threads, [&] {
        return [&, encoder = Encoder(*kernels_, *book_)](size_t i) mutable {
          encoder.encode(x + i * size, shape,
                         {Quantiser(quantisers(i)), parameters(i), relative},
                         profile_of(frequencies, channels, i, shape), parts[i],
                         (Channel*)records + i * shape.channels);
        };
      });
    }
    nb::list out;
    for (auto& part : parts) out.append(nb::bytes(part.data(), part.size()));
    return nb::make_tuple(
        nb::ndarray<nb::numpy, uint8_t>(records, {sections, size_t(shape.channels), 4}, owner), out);
  }

  void decode(In<uint8_t, 1> data, In<uint64_t, 1> ends, In<uint8_t, 3> records, int dtype,
              Profile frequencies, Records channels, Output out, int threads) const {
    const size_t sections = out.shape(0);
    const Shape shape = checked_shape(out.shape(1), out.shape(2), dtype, out.itemsize());
    require(ends.shape(0) == sections, "one end per section");
    require(records.shape(0) == sections && records.shape(1) == size_t(shape.channels) &&
                records.shape(2) == sizeof(Channel),
            "records are [sections, channels, 4]");
    for (size_t i = 0; i < sections; ++i)
      require(ends(i) <= data.shape(0) && (i ? ends(i - 1) : 0) <= ends(i),
              "sections must follow one another inside the data");
    check_profile(frequencies, channels, sections, shape);
    std::atomic<const char*> fault{nullptr};
    {
      nb::gil_scoped_release release;
      const size_t size = size_t(shape.tokens) * shape.channels * dtype_bytes(shape.dtype);
      spread(sections, threads, [&] {
        return [&, decoder = Decoder(*kernels_, *book_)](size_t i) mutable {
          const size_t start = i ? ends(i - 1) : 0;
          const char* wrong = decoder.decode(
              data.data() + start, ends(i) - start, shape,
              profile_of(frequencies, channels, i, shape),
              (const Channel*)records.data() + i * shape.channels, (char*)out.data() + i * size);
          if (wrong) fault = wrong;
        };
      });
    }
    if (fault) throw nb::value_error(fault);
  }

 private:
  static void check_profile(const Profile& freq, const Records& channels, size_t sections, Shape s) {
    require(freq.has_value() == channels.has_value(), "a profile has tables and channel records");
    if (!freq) return;
    require(freq->shape(0) == sections && freq->shape(1) == size_t(s.channels) &&
                freq->shape(2) == kSymbols && channels->shape(0) == sections &&
                channels->shape(1) == size_t(s.channels) &&
                channels->shape(2) == sizeof(Channel),
            "a profile is [sections, channels, 32] frequencies and [sections, channels, 4] records");
    for (size_t i = 0; i < sections * s.channels; ++i) {
      require(valid_frequencies(freq->data() + i * kSymbols),
              "the profile has a table that does not add up");
      require(((const Channel*)channels->data())[i].shift() <= kMaxShift,
              "the profile has a channel record out of range");
    }
  }

  static ProfileSection profile_of(const Profile& freq, const Records& channels, size_t i, Shape s) {
    if (!freq) return {};
    return {freq->data() + i * s.channels * kSymbols,
            (const Channel*)channels->data() + i * s.channels};
  }

  const Kernels* kernels_;
  std::unique_ptr<Codebook> book_;
};

}  // namespace

NB_MODULE(_codec, m) {
  nb::class_<Codec>(m, "Codec")
      .def(nb::init<In<uint16_t, 3>, In<uint16_t, 3>, const std::string&>(), nb::arg("frequencies"),
           nb::arg("spreads"), nb::arg("isa") = "")
      .def_prop_ro("isa", &Codec::isa)
      .def("encode", &Codec::encode, nb::arg("values"), nb::arg("dtype"), nb::arg("quantisers"),
           nb::arg("parameters"), nb::arg("relative"), nb::arg("frequencies").none(),
           nb::arg("channels").none(), nb::arg("threads") = 1)
      .def("decode", &Codec::decode, nb::arg("data"), nb::arg("ends"), nb::arg("records"),
           nb::arg("dtype"), nb::arg("frequencies").none(), nb::arg("channels").none(),
           nb::arg("out"), nb::arg("threads") = 1);
  m.def("instruction_sets", [] {
    nb::list names;
    for (const char* name : {"portable", "avx2", "avx512"})
      if (kernels_named(name)) names.append(name);
    return names;
  });
}
