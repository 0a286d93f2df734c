// The Python module `vllm_kvcompress.engine._cpu`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;
using namespace kvc::cpu;

namespace {

template <class T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

template <class Ids>
void require_below(const Ids& ids, size_t end, const char* what) {
  for (size_t i = 0; i < ids.size(); ++i) require(size_t(ids.data()[i]) < end, what);
}

bool side_by_side(const In<int32_t, 2>& where, size_t rows, size_t count, size_t row, size_t step) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < count; ++i)
      if (where.data()[r * row + i * step] != where.data()[r * row] + int32_t(i)) return false;
  return true;
}

class PageKernels {
 public:
  PageKernels(nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> pages, int dtype,
              In<int32_t, 2> keys, In<int32_t, 2> values, const std::string& isa)
      : pages_(pages), keys_(keys), values_(values), kernels_(kernels_named(isa.c_str())) {
    require(kernels_, "this machine has no such instruction set");
    require(dtype >= 0 && dtype <= 2, "dtype must be 0 (bf16), 1 (fp16) or 2 (fp32)");
    const size_t D = keys.shape(0), B = keys.shape(1), elements = pages.shape(1);
    require(pages.itemsize() == dtype_bytes(Dtype(dtype)), "the pages are not of that dtype");
    require(values.shape(0) == D && values.shape(1) == B && D && B && elements == 2 * B * D,
            "a page holds [D, B] keys and as many values");
    for (size_t i = 0; i < B * D; ++i)
      require(size_t(keys.data()[i]) < elements && size_t(values.data()[i]) < elements,
              "an element stands outside its page");
    pool_ = {(char*)pages.data(), Dtype(dtype), elements, int(B), int(D), keys.data(),
             values.data(), side_by_side(keys, D, B, B, 1), side_by_side(values, B, D, 1, B)};
  }

  std::string isa() const { return kernels_->name; }

  void score(In<float, 5> queries, In<int64_t, 1> query_positions, In<float, 1> fade,
             In<int64_t, 3> pages, std::optional<In<int32_t, 2>> lengths,
             nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu> positions,
             int exclude_tokens, bool score_window, const Rule& rule, Out<float, 3> scores,
             int threads) const {
    const size_t L = queries.shape(0), H = queries.shape(1), w = queries.shape(3);
    const size_t n = scores.shape(2), P = pages.shape(2);
    require(queries.shape(4) == size_t(pool_.head_size) && w && queries.shape(2),
            "queries are [L, H, G, w, D]");
    require(query_positions.shape(0) == w && fade.shape(0) == w, "one of each per query");
    require(pages.shape(0) == L && pages.shape(1) == H && scores.shape(0) == L &&
                scores.shape(1) == H && n && n <= P * pool_.page_tokens && n < 1u << 30,
            "pages are [L, H, P] and hold the n candidates");
    const bool shared = positions.ndim() == 1;
    require(positions.size() == (shared ? n : L * H * n), "positions are [n] or [L, H, n]");
    require(!lengths || lengths->size() == L * H, "lengths are [L, H]");
    for (size_t i = 0; lengths && i < L * H; ++i)
      require(lengths->data()[i] >= 0 && size_t(lengths->data()[i]) <= n, "lengths are at most n");
    require_below(pages, pages_.shape(0), "a page is not of the pool");

    const int64_t oldest = *std::min_element(query_positions.data(), query_positions.data() + w);
    const size_t given = queries.shape(2) * w * pool_.head_size;
    Window lane{int(w), int(queries.shape(2)), int(n), nullptr, fade.data()};
    const Scratch sizes(pool_, rule, lane);
    threads = int(std::min<size_t>(std::max(threads, 1), L * H));
    const std::unique_ptr<float[]> scratch(new float[threads * sizes.floats()]);
    std::vector<int> bounds(threads * 2 * w);
    nb::gil_scoped_release release;
    spread(L * H, threads, [&](int thread, size_t i) {
      const int64_t* first = positions.data() + (shared ? 0 : i * n);
      const int64_t* last = first + (lengths ? lengths->data()[i] : n);
      int *seen = &bounds[thread * 2 * w], *scored = seen + w;
      for (size_t q = 0; q < w; ++q) {
        const int64_t asked = query_positions(q), from = asked - exclude_tokens;
        seen[q] = int(std::upper_bound(first, last, asked) - first);
        const int64_t newest = score_window ? from : std::min(from, oldest - 1);
        scored[q] = int(std::upper_bound(first, last, newest) - first);
      }
      Window own = lane;
      own.queries = queries.data() + i * given;
      own.pages = pages.data() + i * P;
      own.seen = seen;
      own.scored = scored;
      own.scores = scores.data() + i * n;
      kernels_->score(pool_, rule, own, sizes, scratch.get() + thread * sizes.floats());
    });
  }

  void copy(In<int64_t, 3> pages, int64_t tokens, In<int64_t, 1> kept, In<int64_t, 1> arena_blocks,
            int threads) const {
    const int64_t B = pool_.page_tokens, lanes = pages.shape(0) * pages.shape(1);
    const int64_t P = pages.shape(2), targets = arena_blocks.shape(0) * lanes;
    require(tokens > 0 && tokens <= P * B, "the pages hold the candidates");
    require(int64_t(kept.shape(0)) == targets * B, "the kept tokens fill the arena");
    require_below(kept, lanes * tokens, "a kept token is no candidate");
    require_below(pages, pages_.shape(0), "a page is not of the pool");
    require_below(arena_blocks, pages_.shape(0) / lanes, "an arena block is not of the pool");
    nb::gil_scoped_release release;
    threads = std::max(threads, 1);
    std::vector<int64_t> sources(threads * B);
    std::vector<int> offsets(threads * B);
    spread(targets, threads, [&](int thread, size_t i) {
      for (int64_t t = 0; t < B; ++t) {
        const int64_t token = kept.data()[i * B + t], lane = token / tokens;
        const int64_t index = token - lane * tokens;
        sources[thread * B + t] = pages.data()[lane * P + index / B];
        offsets[thread * B + t] = int(index % B);
      }
      const int64_t target = arena_blocks(i / lanes) * lanes + i % lanes;
      kernels_->copy(pool_, &sources[thread * B], &offsets[thread * B], target);
    });
  }

 private:
  nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> pages_;
  In<int32_t, 2> keys_, values_;
  const Kernels* kernels_;
  Pool pool_;
};

Rule make_rule(bool square, bool peak, int pool_tokens, int pool_before, bool pool_mean,
               bool group_max, float group_factor) {
  require(pool_tokens >= 1 && pool_tokens <= 1024 && pool_before >= 0 && pool_before < pool_tokens,
          "1 to 1024 keys are pooled, the key itself among them");
  return {square, peak, pool_tokens, pool_before, pool_mean, group_max, group_factor};
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::class_<Rule>(m, "Rule").def(nb::new_(&make_rule), nb::kw_only(), nb::arg("square"),
                                  nb::arg("peak"), nb::arg("pool_tokens"), nb::arg("pool_before"),
                                  nb::arg("pool_mean"), nb::arg("group_max"),
                                  nb::arg("group_factor"));
  nb::class_<PageKernels>(m, "PageKernels")
      .def(nb::init<nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>, int, In<int32_t, 2>,
                    In<int32_t, 2>, const std::string&>(),
           nb::arg("pages"), nb::arg("dtype"), nb::arg("keys"), nb::arg("values"),
           nb::arg("isa") = "")
      .def_prop_ro("isa", &PageKernels::isa)
      .def("score", &PageKernels::score, nb::arg("queries"), nb::arg("query_positions"),
           nb::arg("fade"), nb::arg("pages"), nb::arg("lengths").none(), nb::arg("positions"),
           nb::arg("exclude_tokens"), nb::arg("score_window"), nb::arg("rule"), nb::arg("scores"),
           nb::arg("threads") = 1)
      .def("copy", &PageKernels::copy, nb::arg("pages"), nb::arg("tokens"), nb::arg("kept"),
           nb::arg("arena_blocks"), nb::arg("threads") = 1);
  m.def("instruction_sets", [] {
    nb::list names;
    for (const char* name : {"portable", "avx2", "avx512"})
      if (kernels_named(name)) names.append(name);
    return names;
  });
}
