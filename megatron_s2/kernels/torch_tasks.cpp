// The calls of the torch backend's plan (torch_plan.py) as one parallel region over tasks.
//
// A task is a range of query rows of one KV head in one batch element. It computes all of its keys, one flash
// attention of PyTorch after the other, and merges them by log-sum-exp. Tasks share nothing, so a thread that is
// interrupted delays none but its own: threads take the next task as they become free.
//
// In backward a task adds up the gradients of its keys in tensors of its own, which are added to those of its KV
// head in the order of the tasks: results do not depend on which thread takes which task. The number of threads decides
// how many rows a task has, and with that how gradients are rounded.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

enum Kind : int64_t { kCausal, kBand, kPast };
enum Source : int64_t { kWindow, kShard };

// One row of the table that torch_native.py makes of a plan. Positions are tokens.
struct Call {
  int64_t kind, start, stop, source, keys_start, keys_stop;
};

// KV heads of equal pattern, as views of the whole tensors.
struct Part {
  Tensor q;             // [batch, heads, queries, dim]
  Tensor k[2], v[2];    // window [batch, kv_heads, tokens, dim], shard [batch, kv_heads, blocks, block, dim]
  std::vector<Call> calls;
  int64_t q_start;      // position of the first query
  int64_t k_start;      // position of the first token of the window source
  int64_t batch() const { return q.size(0); }
  int64_t kv_heads() const { return k[0].size(1); }
  int64_t group() const { return q.size(1) / kv_heads(); }
};

using Head = std::tuple<int64_t, int64_t, int64_t>;  // part, batch, KV head

struct Task {
  int64_t part, batch, head, start, stop;
  int64_t turn = 0;  // place in the order of the tasks of its head
  Head kv_head() const { return {part, batch, head}; }
};

struct Shape {
  int64_t block, local, rows;  // tokens of a block, blocks of a window, rows of a task
  double scale;
};

std::vector<Call> calls_of(const Tensor& table) {
  std::vector<Call> calls;
  auto rows = table.accessor<int64_t, 2>();
  for (int64_t i = 0; i < rows.size(0); ++i) {
    calls.push_back({rows[i][0], rows[i][1], rows[i][2], rows[i][3], rows[i][4], rows[i][5]});
  }
  return calls;
}

std::vector<Part> parts_of(at::TensorList q, at::TensorList sources, at::TensorList tables, at::IntArrayRef starts) {
  std::vector<Part> parts;
  for (size_t i = 0; i < q.size(); ++i) {
    parts.push_back({q[i],
                     {sources[4 * i], sources[4 * i + 2]},
                     {sources[4 * i + 1], sources[4 * i + 3]},
                     calls_of(tables[i]),
                     starts[2 * i],
                     starts[2 * i + 1]});
  }
  return parts;
}

// Late rows see the most keys: they come first.
std::vector<Task> tasks_of(const std::vector<Part>& parts, const Shape& shape) {
  std::vector<Task> tasks;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Part& part = parts[p];
    const int64_t end = part.q_start + part.q.size(2);
    for (int64_t start = part.q_start; start < end;) {
      const int64_t stop = std::min(end, (start / shape.rows + 1) * shape.rows);
      for (int64_t b = 0; b < part.batch(); ++b)
        for (int64_t g = 0; g < part.kv_heads(); ++g) tasks.push_back({(int64_t)p, b, g, start, stop});
      start = stop;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.start > b.start; });
  std::map<Head, int64_t> turns;
  for (Task& task : tasks) task.turn = turns[task.kv_head()]++;
  return tasks;
}

// Calls run(i) for i = 0 .. n-1, each on one thread, begun in this order.
void for_each_task(int64_t n, const std::function<void(int64_t)>& run) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  const int64_t threads = std::min<int64_t>(n, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // Below autograd, and below modes of the caller: they see one operator, on whatever thread its parts run.
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard below_modes(
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
    for (int64_t i = next++; i < n; i = next++) {
      try {
        run(i);
      } catch (...) {
        std::lock_guard<std::mutex> guard(mutex);
        error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

// The part of a task in one call: queries [start, stop) and keys [keys_start, keys_stop) of a source.
struct Flash {
  Kind kind;
  int64_t start, stop, source, keys_start, keys_stop;
};

std::vector<Flash> flashes_of(const Task& task, const Part& part, const Shape& shape) {
  std::vector<Flash> found;
  for (const Call& call : part.calls) {
    const int64_t start = std::max(call.start, task.start), stop = std::min(call.stop, task.stop);
    if (start >= stop) continue;
    if (call.kind == kCausal) {
      found.push_back({kCausal, start, stop, kWindow, start, stop});
      if (call.start < start) found.push_back({kPast, start, stop, kWindow, call.start, start});
    } else if (call.kind == kBand) {
      found.push_back({kBand, start, stop, kWindow, start - (shape.local - 1) * shape.block, stop});
    } else if (call.keys_start < call.keys_stop) {
      found.push_back({kPast, start, stop, call.source, call.keys_start, call.keys_stop});
    }
  }
  return found;
}

int64_t first_key(const Part& part, int64_t source) { return source == kWindow ? part.k_start : 0; }

// A task's rows of `[batch, heads, queries, …]`: `[1, group, rows, …]`.
Tensor rows_of(const Tensor& x, const Task& task, const Part& part, int64_t start, int64_t stop) {
  return x.narrow(0, task.batch, 1)
      .narrow(1, task.head * part.group(), part.group())
      .narrow(2, start - part.q_start, stop - start);
}

Tensor keys_of(const Tensor& x, const Task& task, const Part& part, const Flash& flash) {
  const Tensor keys = x.narrow(0, task.batch, 1).narrow(1, task.head, 1);
  const int64_t start = flash.keys_start - first_key(part, flash.source), n = flash.keys_stop - flash.keys_start;
  if (flash.source == kWindow) return keys.narrow(2, start, n);
  return keys.narrow(2, start / keys.size(3), n / keys.size(3)).flatten(2, 3);
}

// Queries as a flash kernel needs them beside keys: of the same dim and dtype, with stride 1 in dim.
Tensor fitted(const Tensor& x, const Tensor& keys) {
  Tensor found = x.to(keys.scalar_type());
  if (found.size(-1) < keys.size(-1)) found = at::constant_pad_nd(found, {0, keys.size(-1) - found.size(-1)});
  return found.stride(-1) == 1 ? found : found.contiguous();
}

// Overlapping windows `[1, rows, local * block, dim]` of the keys of a Band.
Tensor windows_of(const Tensor& keys, const Shape& shape) {
  return keys.unfold(2, shape.local * shape.block, shape.block).transpose(-1, -2).flatten(1, 2);
}

// `[1, group, rows * block, …]` as `[1, rows, group * block, …]`; its own inverse.
Tensor fold(const Tensor& x, const Shape& shape) {
  return x.unflatten(2, {-1, shape.block}).transpose(1, 2).flatten(2, 3);
}

// Additive [1, 1, group * block, local * block]: minus infinity above the diagonal of the last block. Each task makes
// its own: on one thread that takes less than a parallel region.
Tensor band_mask(const Part& part, const Shape& shape) {
  const int64_t keys = shape.local * shape.block;
  Tensor mask = at::full({shape.block, keys}, -std::numeric_limits<double>::infinity(), part.k[0].options());
  mask = mask.triu(keys - shape.block + 1);
  return mask.repeat({part.group(), 1}).unsqueeze(0).unsqueeze(0);
}

void forward_task(const Task& task, const Part& part, const Shape& shape, Tensor out, Tensor lse) {
  for (const Flash& flash : flashes_of(task, part, shape)) {
    Tensor k = keys_of(part.k[flash.source], task, part, flash);
    Tensor q = fitted(rows_of(part.q, task, part, flash.start, flash.stop), k);
    Tensor v = keys_of(part.v[flash.source], task, part, flash);
    Tensor o, l;
    if (flash.kind == kBand) {
      std::tie(o, l) = at::_scaled_dot_product_flash_attention_for_cpu(
          fold(q, shape), windows_of(k, shape), windows_of(v, shape), 0.0, false, band_mask(part, shape),
          shape.scale);
      o = fold(o, shape);
      l = fold(l, shape);
    } else {
      std::tie(o, l) = at::_scaled_dot_product_flash_attention_for_cpu(
          q, k, v, 0.0, flash.kind == kCausal, std::nullopt, shape.scale);
    }
    Tensor out_rows = rows_of(out, task, part, flash.start, flash.stop);
    Tensor lse_rows = rows_of(lse, task, part, flash.start, flash.stop);
    o = o.narrow(-1, 0, out_rows.size(-1));
    if (flash.kind == kPast) {
      out_rows.lerp_(o.to(out_rows.scalar_type()), at::sigmoid(l - lse_rows).unsqueeze(-1));
      lse_rows.copy_(at::logaddexp(lse_rows, l));
    } else {
      out_rows.copy_(o);
      lse_rows.copy_(l);
    }
  }
}

// Gradients of the keys that a task reads, from position `start` of each source on.
struct KeyGradients {
  int64_t start[2];
  Tensor k[2], v[2];  // by source: [1, 1, tokens, dim]
};

KeyGradients key_gradients(const std::vector<Flash>& flashes, const Task& task, const Part& part, const Tensor& like) {
  KeyGradients grads;
  for (int64_t source : {kWindow, kShard}) {
    int64_t start = std::numeric_limits<int64_t>::max(), stop = 0;
    for (const Flash& flash : flashes) {
      if (flash.source != source) continue;
      start = std::min(start, flash.keys_start);
      stop = std::max(stop, flash.keys_stop);
    }
    start = std::min(start, stop);
    grads.start[source] = start;
    grads.k[source] = at::zeros({1, 1, stop - start, part.k[0].size(-1)}, like.options());
    grads.v[source] = at::zeros({1, 1, stop - start, part.v[0].size(-1)}, like.options());
  }
  return grads;
}

void add_windows(Tensor grad, const Tensor& windows, const Shape& shape) {
  const int64_t rows = windows.size(1);
  for (int64_t w = 0; w < shape.local; ++w) {
    Tensor block = windows.narrow(2, w * shape.block, shape.block);  // [1, rows, block, dim]
    grad.narrow(2, w * shape.block, rows * shape.block).add_(block.reshape({1, 1, rows * shape.block, -1}));
  }
}

KeyGradients backward_task(const Task& task, const Part& part, const Shape& shape, const Tensor& dout,
                           const Tensor& out, const Tensor& lse, Tensor dq) {
  const std::vector<Flash> flashes = flashes_of(task, part, shape);
  KeyGradients grads = key_gradients(flashes, task, part, dq);
  for (const Flash& flash : flashes) {
    const bool band = flash.kind == kBand;
    Tensor k = keys_of(part.k[flash.source], task, part, flash);
    Tensor v = keys_of(part.v[flash.source], task, part, flash);
    if (band) {
      k = windows_of(k, shape);
      v = windows_of(v, shape);
    }
    auto rows = [&](const Tensor& x) {
      Tensor found = rows_of(x, task, part, flash.start, flash.stop);
      return band ? fold(found, shape) : found;
    };
    auto [dq_rows, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        fitted(rows(dout), k), fitted(rows(part.q), k), k, v, fitted(rows(out), k), rows(lse), 0.0,
        flash.kind == kCausal, band ? std::optional<Tensor>(band_mask(part, shape)) : std::nullopt, shape.scale);
    Tensor target = rows_of(dq, task, part, flash.start, flash.stop);
    dq_rows = (band ? fold(dq_rows, shape) : dq_rows).narrow(-1, 0, target.size(-1));
    target.add_(dq_rows);
    const int64_t offset = flash.keys_start - grads.start[flash.source], n = flash.keys_stop - flash.keys_start;
    Tensor grad_k = grads.k[flash.source].narrow(2, offset, n), grad_v = grads.v[flash.source].narrow(2, offset, n);
    if (band) {
      add_windows(grad_k, dk, shape);
      add_windows(grad_v, dv, shape);
    } else {
      grad_k.add_(dk);
      grad_v.add_(dv);
    }
  }
  return grads;
}

// Adds to the gradients of a part's k, v, k_shard and v_shard.
void add_keys(const KeyGradients& found, const Task& task, const Part& part, const Tensor* grads) {
  for (int64_t source : {kWindow, kShard}) {
    const int64_t start = found.start[source] - first_key(part, source), n = found.k[source].size(2);
    if (n == 0) continue;
    auto add = [&](Tensor grad, const Tensor& x) {
      grad = grad.narrow(0, task.batch, 1).narrow(1, task.head, 1);
      const Tensor fitting = x.narrow(-1, 0, grad.size(-1));
      const int64_t block = grad.size(3);  // of a shard
      if (source == kWindow) {
        grad.narrow(2, start, n).add_(fitting);
      } else {
        grad.narrow(2, start / block, n / block).add_(fitting.unflatten(2, {-1, block}));
      }
    };
    add(grads[2 * source], found.k[source]);
    add(grads[2 * source + 1], found.v[source]);
  }
}

// Adds the gradients that the tasks of a KV head found to those of the head, one after the other in the order of
// the tasks.
class OrderedSum {
 public:
  // Blocks while `most` or more of the tasks before this one are not added: what waits for them takes memory.
  void wait(const Task& task, int64_t most) {
    for (int64_t next = next_; task.turn >= next + most; next = next_) next_.wait(next);
  }

  // Calls `add` for the gradients of the task, if it is the next, and of those that have waited for it.
  void add(const Task& task, KeyGradients found, const std::function<void(const KeyGradients&)>& add) {
    std::lock_guard<std::mutex> guard(mutex_);
    waiting_.emplace(task.turn, std::move(found));
    for (auto it = waiting_.find(next_); it != waiting_.end(); it = waiting_.find(next_)) {
      add(it->second);
      waiting_.erase(it);
      ++next_;
    }
    next_.notify_all();
  }

  // After an error there is no sum: no task waits for another.
  void give_up() {
    next_ = std::numeric_limits<int64_t>::max() / 2;
    next_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, KeyGradients> waiting_;
  std::atomic<int64_t> next_{0};
};

}  // namespace

// out and lse are written: per part, views [batch, heads, queries, dim] and [batch, heads, queries].
static void forward(at::TensorList q, at::TensorList sources, at::TensorList tables, at::IntArrayRef starts,
                    at::TensorList out, at::TensorList lse, int64_t block, int64_t local, int64_t rows, double scale) {
  const Shape shape{block, local, rows, scale};
  const std::vector<Part> parts = parts_of(q, sources, tables, starts);
  const std::vector<Task> tasks = tasks_of(parts, shape);
  for_each_task(tasks.size(), [&](int64_t i) {
    const int64_t p = tasks[i].part;
    forward_task(tasks[i], parts[p], shape, out[p], lse[p]);
  });
}

// dq is written; grads are added to: per part, gradients of k, v, k_shard and v_shard.
static void backward(at::TensorList dout, at::TensorList q, at::TensorList sources, at::TensorList tables,
                     at::IntArrayRef starts, at::TensorList out, at::TensorList lse, at::TensorList dq,
                     at::TensorList grads, int64_t block, int64_t local, int64_t rows, double scale) {
  const Shape shape{block, local, rows, scale};
  const std::vector<Part> parts = parts_of(q, sources, tables, starts);
  const std::vector<Task> tasks = tasks_of(parts, shape);
  std::map<Head, OrderedSum> sums;
  for (const Task& task : tasks) sums[task.kv_head()];
  const int64_t most_waiting = 2 * at::get_num_threads();
  for_each_task(tasks.size(), [&](int64_t i) {
    const Task& task = tasks[i];
    const Part& part = parts[task.part];
    OrderedSum& sum = sums.at(task.kv_head());
    sum.wait(task, most_waiting);
    try {
      const int64_t p = task.part;
      sum.add(task, backward_task(task, part, shape, dout[p], out[p], lse[p], dq[p]),
              [&](const KeyGradients& found) { add_keys(found, task, part, &grads[4 * p]); });
    } catch (...) {
      sum.give_up();
      throw;
    }
  });
}

TORCH_LIBRARY(megatron_s2_cpu, m) {
  m.def(
      "forward(Tensor[] q, Tensor[] sources, Tensor[] tables, int[] starts, Tensor(a!)[] out, Tensor(b!)[] lse, "
      "int block, int local, int rows, float scale) -> ()");
  m.def(
      "backward(Tensor[] dout, Tensor[] q, Tensor[] sources, Tensor[] tables, int[] starts, Tensor[] out, "
      "Tensor[] lse, Tensor(a!)[] dq, Tensor(b!)[] grads, int block, int local, int rows, float scale) -> ()");
  m.impl("forward", c10::DispatchKey::CPU, forward);
  m.impl("backward", c10::DispatchKey::CPU, backward);
}
