// Values of the whole process that survive a fork.
#pragma once
#include <pthread.h>

namespace parnet::cpu {

// A forked child gets a value of its own: a thread that it does not have may have held a mutex of the
// parent's, or have been changing its value. The parent's is left behind.
template <class T>
T* process_value = [] {
  pthread_atfork(nullptr, nullptr, [] { process_value<T> = new T; });
  return new T;
}();

}  // namespace parnet::cpu
