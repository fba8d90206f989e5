// numpy arrays that own their memory.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <initializer_list>

template <class T>
using Output = nanobind::ndarray<nanobind::numpy, T>;

// A new numpy array of this shape, filled by the caller.
template <class T>
Output<T> new_array(std::initializer_list<size_t> shape) {
  size_t size = 1;
  for (const size_t extent : shape) size *= extent;
  T* data = new T[size];
  nanobind::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Output<T>(data, shape, owner);
}

template <class T, class Values>
Output<T> copy_array(const Values& values) {
  Output<T> array = new_array<T>({values.size()});
  std::copy(values.begin(), values.end(), array.data());
  return array;
}
