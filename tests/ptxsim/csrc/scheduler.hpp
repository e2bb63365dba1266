// How warps, blocks and clusters take turns.
#pragma once
#include "machine.hpp"

namespace ptxsim {

// How an instruction treats the lanes of a warp
enum LaneClass : u8 {
  kIndependent,  // runs for whichever lanes are here
  kControl,      // moves lanes about
  kMembers,      // .sync with a member mask: waits for the lanes it names
  kWholeWarp,    // .aligned: waits for all live lanes
};

Handler resolve_handler(const Instruction& in, u8& lane_class);  // dispatch.cpp; null: no such form

// barrier.cpp
bool barrier_arrive(Context& c, const Instruction& in, Group& group);  // true: the group waits now
void barriers_after_exit(Context& c);

// cluster.cpp
bool cluster_wait(Context& c, Group& group);  // true: the group waits now
void cluster_after_exit(Context& c, u32 mask);

// round_trips.cpp
void count_trips(Context& c, const Instruction& in);  // before the instruction runs
void finish_trips(Machine& m, const Warp& w);         // when the warp has ended

// warp_scheduler.cpp
int run_warp(Context& c, int budget, bool rotate);  // returns the instructions executed
std::string where_are(const Machine& m, const Block& b);

// block_scheduler.cpp
struct LaunchOptions {
  int resident = 1;        // clusters
  std::vector<u32> order;  // of the clusters; empty: ascending
};
void run_grid(Machine& m, const LaunchOptions& options);

}  // namespace ptxsim
