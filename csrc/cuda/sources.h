// The sources of an assignment: the tokens of each output row, so that a merge need not look for
// them. By one block, from the rows that a match has numbered.
//
// int32 [N' + 1 + N]: where each row begins among the tokens, and the last ends; then the tokens
// row by row, ascending in each. The first rows have one token, CLS, DIST and the unmerged of A in
// turn; a row of B has its own and the merged ones of A that joined it:
//
//   count    the tokens of A that join each row of B, into the offset after it
//   place    one row after the other by a prefix sum of the counts, each with its own token first;
//            what is behind that becomes the row's cursor
//   move in  the merged tokens, ascending, as many at a time as there are threads: behind the
//            cursor by as many as join the same row before them, one less if before its own token
//
// A cursor ends where the next row begins, so the offsets are there in the end. Integers are added
// by atomics, whose order does not show. Some 8 N bytes written, and a comparison for each merged
// token and thread.
#pragma once

#include "simt.h"

namespace fastast {

struct SourcesLane {
  int32_t count, before, place;
};

struct MatchSources {
  int32_t *offsets, *tokens;

  // Of a sample of a match, of N - r rows.
  template <class Params>
  FASTAST_DEVICE MatchSources(const Params& p, int64_t b)
      : offsets(p.sources + b * (2 * p.n - p.r + 1)), tokens(offsets + p.n - p.r + 1) {}
};

// `joined` [r] has the merged tokens of A, ascending, and the tokens of the first rows are in their
// places; `targets` is shared memory for an int a thread.
template <class Lane, int kWarps, class Params>
FASTAST_DEVICE void write_sources(Team<Lane, kWarps>& team, const Params& p, int64_t b,
                                  const int32_t* joined, int32_t* targets) {
  constexpr int kThreads = kWarps * kWarp;
  const MatchSources out(p, b);
  const int32_t* rows = p.rows + b * p.n;
  const int32_t r = static_cast<int32_t>(p.r), n_out = static_cast<int32_t>(p.n) - r;
  const int32_t n_kept = static_cast<int32_t>((p.n + 1) / 2) - r;
  const int32_t first = n_kept + p.distill_token;  // of the rows that tokens join
  const auto own_token = [&](int32_t row) { return 2 * (row - n_kept) + 1; };
  team.each([&](int thread, Lane&) {
    for (int32_t row = thread; row <= n_out; row += kThreads)
      out.offsets[row] = row <= first ? row : 0;
  });
  team.sync();
  team.each([&](int thread, Lane&) {
    for (int32_t k = thread; k < r; k += kThreads) increment(out.offsets + rows[2 * joined[k]] + 1);
  });
  team.sync();
  const int32_t run = (n_out - first + kThreads - 1) / kThreads;
  const auto each_of_run = [&](int thread, auto f) {
    const int32_t from = first + thread * run;
    for (int32_t row = from; row < from + run && row < n_out; ++row) f(row);
  };
  team.each([&](int thread, Lane& lane) {
    lane.count = 0;
    each_of_run(thread, [&](int32_t row) { lane.count += 1 + out.offsets[row + 1]; });
  });
  team.sum_before(&Lane::count, &Lane::before);
  team.each([&](int thread, Lane& lane) {
    int32_t start = first + lane.before;
    each_of_run(thread, [&](int32_t row) {
      out.tokens[start] = own_token(row);
      const int32_t count = out.offsets[row + 1];
      out.offsets[row + 1] = start + 1;
      start += 1 + count;
    });
  });
  for (int32_t k0 = 0; k0 < r; k0 += kThreads) {
    const int count = r - k0 < kThreads ? r - k0 : kThreads;
    team.sync();  // the cursors have moved, and the targets before have been read
    team.each([&](int thread, Lane&) {
      if (thread < count) targets[thread] = rows[2 * joined[k0 + thread]];
    });
    team.sync();
    team.each([&](int thread, Lane& lane) {
      if (thread >= count) return;
      const int32_t row = targets[thread];
      lane.place = out.offsets[row + 1];
      for (int t = 0; t < thread; ++t) lane.place += targets[t] == row;
      // In front of the row's own token, which moves on by one; the last to push it is right.
      if (2 * joined[k0 + thread] < own_token(row)) out.tokens[lane.place--] = own_token(row);
    });
    team.sync();
    team.each([&](int thread, Lane& lane) {
      if (thread >= count) return;
      out.tokens[lane.place] = 2 * joined[k0 + thread];
      increment(out.offsets + targets[thread] + 1);
    });
  }
}

}  // namespace fastast
