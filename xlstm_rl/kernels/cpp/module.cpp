// The Python module: functions over sequences that take the item size first and then pointers, sizes and numbers as
// Python numbers, and steps of blocks that take the tensors.
//
// Nothing of torch is needed to build it. The callers, kernels/cpp_sequence.py and kernels/cpp_mixer.py, answer for
// shapes, strides and lifetimes, and give the arguments in exactly the order in which they are taken here; steps look
// at what they are given.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstring>

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
  PyObject* object() { return take(); }
  // Structures that the caller has packed into bytes, one after the other.
  template <class... Structures> void unpack(Structures&... structures) {
    char* bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(take(), &bytes, &size)) throw BadArguments{};
    if (size != Py_ssize_t((sizeof(Structures) + ...))) {
      PyErr_SetString(PyExc_ValueError, "the plan is not of this layout");
      throw BadArguments{};
    }
    ((std::memcpy(&structures, bytes, sizeof(Structures)), bytes += sizeof(Structures)), ...);
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

// What to run, once all arguments are taken.
template <class Run> Run finished(Run run, Arguments& in) {
  in.finish();
  return run;
}

// Run without holding the interpreter.
template <class Run> void perform(const Run& run) {
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
      perform(finished(Operation::template prepare<float>(in), in));
    else
      perform(finished(Operation::template prepare<double>(in), in));
    Py_RETURN_NONE;
  });
}

// The argument of a step of a block, if its tensors are as the plan says; `plan` packs the constants of the block and
// the shapes of its weights and of its state.
template <class T, class Plan> bool take_step(Arguments& in, const Tensor& x, BlockStep<T, Plan>& step) {
  using Weights = typename Plan::Weights;
  using State = typename Plan::template State<T>;
  constexpr int WEIGHTS = sizeof(Weights) / sizeof(T*), LEAVES = sizeof(State) / sizeof(T*);
  Shape of_weights[WEIGHTS], of_state[LEAVES];
  in.unpack(static_cast<typename Plan::Constants&>(step.plan), of_weights, of_state);
  PyObject *holders = in.object(), *names = in.object(), *state = in.object(), *reset = in.object(), *y = in.object();
  PyObject* new_state = in.object();
  step.B = x.dimensions ? x.sizes[0] : 0;
  step.x = reinterpret_cast<const T*>(x.data);
  // With an axis of time or without.
  const bool timed = x.dimensions == 3;
  const Shape of_x = timed ? Shape{3, 0, {-1, 1, step.plan.D, 0}} : Shape{2, 0, {-1, step.plan.D, 0, 0}};
  const Shape of_reset = timed ? Shape{2, 1, {-1, 1, 0, 0}} : Shape{1, 1, {-1, 0, 0, 0}};
  const T* weights[WEIGHTS];
  T *old_leaves[LEAVES], *new_leaves[LEAVES];
  const bool over = new_state == Py_None;
  const bool fits = x.fits(KIND<T>, of_x, step.B) && find(y, of_x, step.B, step.y) &&
                    find(reset, of_reset, step.B, step.reset, Kind::boolean) &&
                    find_all(state, of_state, step.B, old_leaves) &&
                    (over || find_all(new_state, of_state, step.B, new_leaves)) &&
                    find_held(holders, names, of_weights, weights);
  if (fits) {
    std::memcpy(&static_cast<Weights&>(step.plan), weights, sizeof(weights));
    std::memcpy(&step.state, old_leaves, sizeof(old_leaves));
    std::memcpy(&step.new_state, over ? old_leaves : new_leaves, sizeof(new_leaves));
  }
  return fits;
}

// block_step(threads, x, plan, holders, names, state, reset, y, new state): whether the step was taken, which it is
// only if all tensors are as the plan says. Weights are held by dictionaries under names; without a new state, the step
// writes over the old one.
template <template <class> class Plan> PyObject* block_step(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    Arguments in(values, count);
    const int64_t threads = in.integer();
    Tensor x;
    const bool readable = read(in.object(), x);
    const auto step_of = [&](auto step) {
      const bool fits = take_step(in, x, step);
      in.finish();
      if (PyErr_Occurred()) throw BadArguments{};
      if (fits) perform([&] { step_block(step, threads); });
      return fits;
    };
    const bool taken = readable && (x.kind == Kind::float32 ? step_of(BlockStep<float, Plan<float>>{})
                                                            : step_of(BlockStep<double, Plan<double>>{}));
    return PyBool_FromLong(taken);
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
// use_tensors(Tensor, Parameter, float32, float64, bool, exchange): what `read` knows of torch, held for good;
// `exchange` is its table for DLPack, or anything else where it has none. Gives back whether that is used.
PyObject* use_tensors(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    Arguments in(values, count);
    PyObject* held[5];
    for (PyObject*& object : held) object = in.object();
    PyObject* table = in.object();
    in.finish();
    const auto* exchange = static_cast<const DLExchange*>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
    PyErr_Clear();
    while (exchange && exchange->major > 1) exchange = exchange->previous;
    if (exchange && !exchange->from_object) exchange = nullptr;
    for (PyObject* object : held) Py_INCREF(object);
    const auto name = PyUnicode_InternFromString;
    torch = {reinterpret_cast<PyTypeObject*>(held[0]),
             reinterpret_cast<PyTypeObject*>(held[1]),
             held[2],
             held[3],
             held[4],
             exchange,
             name("is_cpu"),
             name("dtype"),
             name("is_contiguous"),
             name("shape"),
             name("data_ptr"),
             name("is_neg")};
    return PyBool_FromLong(exchange != nullptr);
  });
}
// Whether every module is of its type, has no hook in its dictionaries, and no forward pass of its own; and whether the
// classes have those that are written in them. See memory/fast.py, which has the same in Python.
// bare(hooks, modules, types, attributes, kinds, written): tuples.
PyObject* bare(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    static PyObject* const forward = PyUnicode_InternFromString("forward");
    static PyObject* const compiled_call = PyUnicode_InternFromString("_compiled_call_impl");
    Arguments in(values, count);
    PyObject *hooks = in.object(), *modules = in.object(), *types = in.object(), *attributes = in.object();
    PyObject *kinds = in.object(), *written = in.object();
    in.finish();
    bool is = true;
    for (Py_ssize_t i = 0; is && i < PyTuple_Size(hooks); i++) is = PyDict_Size(PyTuple_GetItem(hooks, i)) == 0;
    for (Py_ssize_t i = 0; is && i < PyTuple_Size(modules); i++)
      is = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GetItem(modules, i))) == PyTuple_GetItem(types, i);
    for (Py_ssize_t i = 0; is && i < PyTuple_Size(attributes); i++) {
      PyObject* held = PyTuple_GetItem(attributes, i);
      is = !PyDict_Contains(held, forward) && !PyDict_Contains(held, compiled_call);
    }
    for (Py_ssize_t i = 0; is && i < PyTuple_Size(kinds); i++) {
      PyObject* found = PyObject_GetAttr(PyTuple_GetItem(kinds, i), forward);
      is = found && found == PyTuple_GetItem(written, i);
      Py_XDECREF(found);
    }
    if (PyErr_Occurred()) return nullptr;
    return PyBool_FromLong(is);
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
    method("mlstm_block_step", block_step<MlstmPlan>),
    method("slstm_block_step", block_step<SlstmPlan>),
    method("bare", bare),
    method("use_tensors", use_tensors),
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
  if (module) PyModule_AddIntConstant(module, "INTERFACE", 7);
  return module;
}
