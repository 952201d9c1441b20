// Routed rows sorted by expert, so that each chosen expert's weights are read once.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace herdling {

struct Group {  // the rows that chose one expert, or some of them
  int64_t expert, first, count;
};

constexpr int64_t kMostRows = 16;  // of a group: the sums of more would leave the caches

// Routed rows (M = tokens * k) sorted by expert, cut into groups.
inline std::vector<Group> sort_rows(const int64_t* chosen, int64_t M, int64_t E, std::vector<int64_t>& order) {
  std::vector<int64_t> ends(E + 1, 0);
  for (int64_t r = 0; r < M; r++) ends[chosen[r] + 1]++;
  for (int64_t e = 0; e < E; e++) ends[e + 1] += ends[e];
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  order.resize(M);
  for (int64_t r = 0; r < M; r++) order[next[chosen[r]]++] = r;
  std::vector<Group> groups;
  for (int64_t e = 0; e < E; e++)
    for (int64_t a = ends[e]; a < ends[e + 1]; a += kMostRows)
      groups.push_back({e, a, std::min(kMostRows, ends[e + 1] - a)});
  return groups;
}

}  // namespace herdling
