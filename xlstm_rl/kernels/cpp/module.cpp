// The Python module: functions that take the item size first and then pointers, sizes and numbers as Python numbers;
// what stays the same from one step of a block to the next comes packed.
//
// Nothing of torch is needed to build it. The caller, kernels/cpp_sequence.py and kernels/cpp_blocks.py, answers for
// shapes, strides and lifetimes, and gives the arguments in exactly the order in which they are taken here.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "blocks.h"
#include "mlstm_mixer_backward.h"

namespace xlstm {

// Python numbers in order. A wrong count or kind raises TypeError in Python and stops the call.
struct BadArguments {};

class Arguments {
  PyObject* const* next;
  PyObject* const* end;

  PyObject* take() {
    if (next == end) throw BadArguments{};
    return *next++;
  }

 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : next(values), end(values + count) {}
  int64_t integer() {
    const long long value = PyLong_AsLongLong(take());
    if (value == -1 && PyErr_Occurred()) throw BadArguments{};
    return value;
  }
  double number() {
    const double value = PyFloat_AsDouble(take());
    if (value == -1 && PyErr_Occurred()) throw BadArguments{};
    return value;
  }
  // A structure that the caller has packed into bytes.
  template <class Structure> Structure packed() {
    char* bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(take(), &bytes, &size)) throw BadArguments{};
    if (size != sizeof(Structure)) throw BadArguments{};
    Structure structure;
    std::memcpy(&structure, bytes, sizeof(Structure));
    return structure;
  }
  // A null pointer is given as zero.
  template <class T> T* pointer() { return reinterpret_cast<T*>(static_cast<uintptr_t>(integer())); }
  void finish() {
    if (next != end) throw BadArguments{};
  }
};

template <class T> struct Call {
  Arguments& in;
  const T* from() { return in.pointer<const T>(); }
  T* to() { return in.pointer<T>(); }

  // Braces keep the order of evaluation.
  Strided<T> strided() { return Strided<T>{from(), in.integer(), in.integer(), in.integer()}; }
  MlstmInput<T> mlstm() {
    return MlstmInput<T>{in.integer(), in.integer(), in.integer(), in.integer(), in.integer(),
                         strided(), strided(), strided(), strided(), strided(),
                         in.pointer<const uint8_t>(), in.integer() != 0, from(), from(), from()};
  }
  SlstmInput<T> slstm() {
    return SlstmInput<T>{in.integer(), in.integer(), in.integer(), in.integer(), from(),
                         in.integer(), in.integer(), in.integer(), in.integer(), from(),
                         in.pointer<const uint8_t>(), in.integer() != 0, from(), from(), from(), from()};
  }
  MlstmMixer<T> mixer() {
    return MlstmMixer<T>{in.integer(), in.integer(), in.integer(), in.integer(), in.integer(), from(),
                         in.integer(), from(), from(), from(),
                         from(), from(), from(), from(), from(), from(), from(), from(),
                         from(), from(), from(), in.pointer<const uint8_t>(),
                         in.number(), in.number(), in.integer() != 0, in.integer() != 0};
  }
};

// Each operation takes its arguments and gives back what to do once the interpreter is let go of.
struct MlstmForward {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> call{in};
    auto x = call.mlstm();
    MlstmOutput<T> out{call.to(), call.to(), call.to(), call.to()};
    T* trace = call.to();
    return [=, threads = in.integer()] { mlstm_forward(x, out, trace, threads); };
  }
};
struct MlstmBackward {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> call{in};
    auto x = call.mlstm();
    const T *hidden = call.from(), *trace = call.from();
    MlstmOuter<T> outer{call.from(), call.from(), call.from()};
    MlstmGradient<T> gradient{call.to(), call.to(), call.to(), call.to(), call.to(), call.to(), call.to()};
    return [=, threads = in.integer()] { mlstm_backward(x, hidden, trace, outer, gradient, threads); };
  }
};
struct SlstmForward {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> call{in};
    auto x = call.slstm();
    SlstmOutput<T> out{call.to(), call.to(), call.to(), call.to(), call.to()};
    T* trace = call.to();
    return [=, threads = in.integer()] { slstm_forward(x, out, trace, threads); };
  }
};
struct SlstmBackward {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> call{in};
    auto x = call.slstm();
    const T *output = call.from(), *trace = call.from();
    SlstmOuter<T> outer{call.from(), call.from(), call.from(), call.from()};
    SlstmGradient<T> gradient{call.to(), call.to(), call.to(), call.to(), call.to()};
    return [=, threads = in.integer()] { slstm_backward(x, output, trace, outer, gradient, threads); };
  }
};
struct MlstmMixerForward {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> call{in};
    auto x = call.mixer();
    MixerOutput<T> out{call.to(), call.to(), call.to(), call.to(), call.to()};
    T* trace = call.to();
    return [=, threads = in.integer()] { mlstm_mixer_forward(x, out, trace, threads); };
  }
};
struct MlstmMixerBackward {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> c{in};
    auto x = c.mixer();
    T* trace = c.to();
    MixerOuter<T> outer{c.from(), c.from(), c.from(), c.from()};
    MixerGradient<T> gradient{c.to(), c.to(), c.to(), c.to(), c.to(), c.to(), c.to(), c.to(), c.to(), c.to(),
                              c.to(), c.to(), c.to(), c.to()};
    T* by_weight = c.to();
    return [=, threads = in.integer()] { mlstm_mixer_backward(x, trace, outer, gradient, by_weight, threads); };
  }
};
struct MlstmBlockStep {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> c{in};
    MlstmBlock<T> block{in.packed<MlstmPlan<T>>(), in.integer(), c.from(), c.from(), c.to(), c.from(), c.from(), c.from(),
                        in.pointer<const uint8_t>(), c.to(), c.to(), c.to(), c.to()};
    return [=, threads = in.integer()] { mlstm_block_step(block, threads); };
  }
};
struct SlstmBlockStep {
  template <class T> static auto prepare(Arguments& in) {
    Call<T> c{in};
    SlstmBlock<T> block{in.packed<SlstmPlan<T>>(), in.integer(), c.from(), c.from(), c.to(), c.from(), c.from(), c.from(),
                        c.from(), in.pointer<const uint8_t>(), c.to(), c.to(), c.to(), c.to(), c.to()};
    return [=, threads = in.integer()] { slstm_block_step(block, threads); };
  }
};

template <class Operation, class T> void perform(Arguments& in) {
  auto run = Operation::template prepare<T>(in);
  in.finish();
  PyThreadState* interpreter = PyEval_SaveThread();
  try {
    run();
  } catch (...) {
    PyEval_RestoreThread(interpreter);
    throw;
  }
  PyEval_RestoreThread(interpreter);
}

// Run with C++ exceptions turned into Python's.
template <class Body> PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const BadArguments&) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Operation> PyObject* function(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    Arguments in(values, count);
    if (in.integer() == sizeof(float))
      perform<Operation, float>(in);
    else
      perform<Operation, double>(in);
    Py_RETURN_NONE;
  });
}

// Numbers in the trace of a forward pass, given the item size and the sizes of its tensors.
struct MlstmTrace {
  template <class T> static int64_t size(Arguments& in) {
    MlstmInput<T> x{};
    for (int64_t* size : {&x.B, &x.steps, &x.H, &x.K, &x.V}) *size = in.integer();
    return x.B * x.H * x.chunks() * x.memory_size();
  }
};
struct SlstmTrace {
  template <class T> static int64_t size(Arguments& in) {
    const int64_t rows = in.integer(), steps = in.integer(), heads = in.integer();
    return rows * steps * heads * FIELDS * padded<T>(in.integer());
  }
};
// Given the item size and the arguments of the mixer: numbers in its trace, or in its gradients by the weights.
struct MixerTraceSize {
  template <class T> static int64_t size(Arguments& in) {
    auto x = Call<T>{in}.mixer();
    return x.B * MixerTrace<T>::size(x);
  }
};
struct MixerWeightsSize {
  template <class T> static int64_t size(Arguments& in) {
    auto x = Call<T>{in}.mixer();
    return x.B * MixerWeightGradient<T>::size(x);
  }
};
template <class Trace> PyObject* trace_size(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([=] {
    Arguments in(values, count);
    const bool single = in.integer() == sizeof(float);
    const int64_t size = single ? Trace::template size<float>(in) : Trace::template size<double>(in);
    in.finish();
    return PyLong_FromLongLong(size);
  });
}
// use_pool(address): run on the threads behind torch_parallel_for.
PyObject* use_pool(PyObject*, PyObject* address) {
  const size_t value = PyLong_AsSize_t(address);
  if (PyErr_Occurred()) return nullptr;
  parallel_for_of_torch = reinterpret_cast<ParallelFor>(value);
  Py_RETURN_NONE;
}

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, Function call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method("mlstm_forward", function<MlstmForward>),
    method("mlstm_backward", function<MlstmBackward>),
    method("mlstm_trace_size", trace_size<MlstmTrace>),
    method("slstm_forward", function<SlstmForward>),
    method("slstm_backward", function<SlstmBackward>),
    method("slstm_trace_size", trace_size<SlstmTrace>),
    method("mlstm_mixer_forward", function<MlstmMixerForward>),
    method("mlstm_mixer_backward", function<MlstmMixerBackward>),
    method("mlstm_mixer_trace_size", trace_size<MixerTraceSize>),
    method("mlstm_mixer_weights_size", trace_size<MixerWeightsSize>),
    method("mlstm_block_step", function<MlstmBlockStep>),
    method("slstm_block_step", function<SlstmBlockStep>),
    {"use_pool", use_pool, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cpp", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace xlstm

#define CONCATENATE(a, b) a##b
#define INITIALISER(name) CONCATENATE(PyInit_, name)
PyMODINIT_FUNC INITIALISER(MODULE_NAME)(void) {
  PyObject* module = PyModule_Create(&xlstm::definition);
  // Raised with every change of the order of arguments, so that a stale build is found out.
  if (module) PyModule_AddIntConstant(module, "INTERFACE", 3);
  return module;
}
