#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UBSan and runs them on random layers at every instruction set this
# machine has; then the baseline with ThreadSanitizer. About a minute on two cores.
set -eu
cd "$(dirname "$0")/../.."
out=${1:-build/sanitize}
cxx=${CXX:-g++}

# compile KIND OPTIMISATION SANITIZED-LEVELS: the other levels are linked, but neither instrumented nor run.
# The kernels are compiled without optimisation for AddressSanitizer: with it that takes a minute a level.
compile() {
  mkdir -p "$out/$1"
  for source in tests/asan/*.cpp csrc/cpu/*.cpp csrc/cpu/*/*.cpp; do
    name=$(basename "$source" .cpp)
    object=$(echo "$source" | tr / _)
    flags="-O1 -fsanitize=$1 -fno-sanitize-recover=all"
    case $name in
      bind*) continue ;; # need torch
      isa_*)
        case " $3 " in *" ${name#isa_} "*) flags="$2 -fsanitize=$1 -fno-sanitize-recover=all" ;; *) flags=-O0 ;; esac
        [ "$(uname -m)" = x86_64 ] && case $name in
          isa_avx2) flags="$flags -mavx2 -mfma -mf16c" ;;
          isa_avx512*) flags="$flags -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c" ;;
        esac
        ;;
      int8_* | bf16_*)
        flags="$flags -ffp-contract=off -Wno-psabi"
        [ "$(uname -m)" = x86_64 ] && case $name in
          int8_avx2) flags="$flags -mavx2 -mfma -mf16c" ;;
          int8_avx_vnni) flags="$flags -mavx2 -mfma -mf16c -mavxvnni" ;;
          int8_avx512_vnni) flags="$flags -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mavx512vnni" ;;
          int8_amx) flags="$flags -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mamx-tile -mamx-int8" ;;
          bf16_amx) flags="$flags -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mamx-tile -mamx-bf16" ;;
        esac
        ;;
    esac
    echo "$cxx -std=c++20 -g1 $flags -c $source -o $out/$1/$object.o"
  done | xargs -P "${MAX_JOBS:-2}" -I{} sh -c '{}'
  $cxx -fsanitize="$1" "$out/$1"/*.o -o "$out/$1/driver" -lpthread
}

levels="portable portable16"
if grep -qw avx2 /proc/cpuinfo; then levels="$levels avx2"; fi
if grep -qw avx512f /proc/cpuinfo; then levels="$levels avx512 avx512_intel"; fi
compile address,undefined -O0 "$levels"
for level in $levels; do PARNET_CPU_ISA=$level "$out/address,undefined/driver" 5; done
compile thread -O1 portable
PARNET_CPU_ISA=portable "$out/thread/driver" 10
