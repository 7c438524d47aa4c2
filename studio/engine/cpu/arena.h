// Where the tensors of a step live: one range of addresses, of which they alone take pieces.
//
// A step frees what it takes, and takes it again with other sizes. In the C library's heap small things that stay, a
// compiled product for instance, come to lie between, and rows of many lengths leave holes that nothing fits. Here
// neighbours that are free are one piece at once, and the smallest piece that is large enough is taken.

#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace arena {

constexpr size_t LEAST = 32 << 10;        // bytes; smaller tensors are the C library's
constexpr size_t MOST = 1 << 30;          // bytes; larger ones, too: it says so where memory is too small for one
constexpr size_t STEP = 64;               // bytes, as PyTorch aligns tensors
constexpr size_t ADDRESSES = 1ull << 40;  // bytes that are reserved; none of them is memory before it is written to

class Arena final : public c10::Allocator {
 public:
  // nullptr where the system does not reserve addresses without memory behind them.
  static Arena* get() {
    static Arena* const own = make();
    return own;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* at = bytes < LEAST || bytes > MOST ? nullptr : take((bytes + STEP - 1) / STEP * STEP);
    if (at == nullptr && bytes > 0) at = c10::alloc_cpu(bytes);
    return {at, at, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  explicit Arena(uintptr_t start) : start(start), end(start) {}

  static Arena* make() {
#if defined(__linux__)
    void* at = mmap(nullptr, ADDRESSES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    return new Arena(reinterpret_cast<uintptr_t>(at));
#else
    return nullptr;
#endif
  }

  static void release(void* at) {
    if (at != nullptr && !get()->put_back(reinterpret_cast<uintptr_t>(at))) c10::free_cpu(at);
  }

  // nullptr at the end of the range.
  void* take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = by_size.lower_bound({size, 0});
    if (found == by_size.end()) return extend(size);
    const auto [whole, at] = *found;
    remove(at, whole);
    if (whole > size) add(at + size, whole - size);
    taken.emplace(at, size);
    return reinterpret_cast<void*>(at);
  }

  // At the end, from where a last free piece begins.
  void* extend(size_t size) {
    uintptr_t at = end;
    if (!free_at.empty()) {
      const auto [last, length] = *free_at.rbegin();
      if (last + length == end) at = last;
    }
    if (size > start + ADDRESSES - at) return nullptr;
    if (at < end) remove(at, end - at);
    end = at + size;
    taken.emplace(at, size);
    return reinterpret_cast<void*>(at);
  }

  // False where it is not from here.
  bool put_back(uintptr_t at) {
    if (at < start || at >= start + ADDRESSES) return false;
    const std::lock_guard<std::mutex> guard(lock);
    const auto own = taken.find(at);
    size_t size = own->second;
    taken.erase(own);
    const auto after = free_at.lower_bound(at);
    if (after != free_at.end() && after->first == at + size) {
      size += after->second;
      remove(after->first, after->second);
    }
    const auto next = free_at.lower_bound(at);
    if (next != free_at.begin()) {
      const auto [before, length] = *std::prev(next);
      if (before + length == at) {
        remove(before, length);
        at = before;
        size += length;
      }
    }
    add(at, size);
    return true;
  }

  void add(uintptr_t at, size_t size) {
    free_at.emplace(at, size);
    by_size.emplace(size, at);
  }

  void remove(uintptr_t at, size_t size) {
    free_at.erase(at);
    by_size.erase({size, at});
  }

  const uintptr_t start;
  uintptr_t end;  // of what was ever taken
  std::mutex lock;
  std::map<uintptr_t, size_t> free_at;
  std::set<std::pair<size_t, uintptr_t>> by_size;
  std::unordered_map<uintptr_t, size_t> taken;
};

// Whether tensors of this process live there from here on.
inline bool use() {
  static const bool used = [] {
    if (Arena::get() == nullptr) return false;
    c10::SetCPUAllocator(Arena::get());
    return true;
  }();
  return used;
}

}  // namespace arena
