// The Trainer's forward passes that train nothing: evaluation, and the logits that text is sampled from.
#include <algorithm>

#include "trainer/trainer.h"

namespace {
// A buffer of the backend as doubles.
std::vector<double> download(const Backend& k, const Buf& b, Stream s) {
    std::vector<char> raw(b.n_bytes());
    k.download(raw.data(), b.data, b.n_bytes(), s);
    k.synchronize(s);
    return as_doubles(Buf(raw.data(), b.count, b.dtype));
}
}  // namespace

EvalResult Trainer::evaluate(uint64_t n_sequences, const ReadSequence& read) {
    const uint64_t B = uint64_t(o_.micro_batch_size), size = uint64_t(comm_.size()), T = uint64_t(o_.model.T);
    const uint64_t n_batches = (n_sequences + B - 1) / B, rounds = (n_batches + size - 1) / size;
    std::vector<int32_t> inputs(B * T), targets(B * T), correct(B * T);
    std::vector<double> mine(rounds * B * 2);  // (rounds, B, 2): loss sum and correct tokens of each sequence
    for (uint64_t round = 0; round < rounds; round++) {
        const uint64_t batch_index = round * size + uint64_t(comm_.rank());
        if (batch_index >= n_batches) continue;
        for (uint64_t b = 0; b < B; b++)  // the last batch is filled up with repeats, which are not counted
            read((batch_index * B + b) % n_sequences, {&inputs[b * T], T}, {&targets[b * T], T});
        const Batch now = batch(0);
        k_.upload(now.inputs.data, inputs.data(), now.inputs.n_bytes(), stream_);
        k_.upload(now.targets.data, targets.data(), now.targets.n_bytes(), stream_);
        o_.model.architecture->forward(pass(now));
        const Buf sums = memory_.losses.slice(0, B);
        k_.row_sum({.y = sums, .x = memory_.loss, .B = int(B), .T = int(T)}, stream_);
        k_.download(correct.data(), memory_.correct.data, memory_.correct.n_bytes(), stream_);
        const std::vector<double> loss = download(k_, sums, stream_);
        for (uint64_t b = 0; b < B; b++) {
            double hits = 0;
            for (uint64_t t = 0; t < T; t++) hits += correct[b * T + t];
            mine[(round * B + b) * 2] = loss[b];
            mine[(round * B + b) * 2 + 1] = hits;
        }
    }
    std::vector<double> all(mine.size() * size);  // (size, rounds, B, 2)
    comm_.all_gather(mine.data(), all.data(), mine.size() * sizeof(double));
    double loss = 0, hits = 0;
    for (uint64_t i = 0; i < n_sequences; i++) {  // global sequence order, whatever the number of ranks
        const uint64_t batch_index = i / B;
        const double* row = &all[((batch_index % size * rounds + batch_index / size) * B + i % B) * 2];
        loss += row[0];
        hits += row[1];
    }
    const double tokens = double(n_sequences * T);
    return {.loss = loss / tokens, .accuracy = hits / tokens, .tokens = n_sequences * T};
}

std::vector<float> Trainer::next_logits(std::span<const int32_t> tokens) {
    const int n = int(tokens.size());
    CHECK_THAT(n >= 1 && n <= o_.model.T, "a context of {} tokens, expected 1 to {}", n, o_.model.T);
    // A context of n tokens needs less than the planned batch; every buffer is narrowed to its exact size.
    ActivationShape shape = memory_.act_shape;
    shape.B = 1, shape.T = n;
    const Architecture& model = *o_.model.architecture;
    const std::vector<ActivationInfo> list = model.activations(o_.model, shape);
    Tensors acts = memory_.acts;
    for (size_t i = 0; i < acts.size(); i++) acts[i] = acts[i].slice(0, list[i].count);
    const Buf inputs = memory_.batch.inputs.slice(0, size_t(n));
    k_.upload(inputs.data, tokens.data(), inputs.n_bytes(), stream_);
    model.forward({.k = k_,
                   .config = o_.model,
                   .params = memory_.params,
                   .acts = acts,
                   .batch = {.inputs = inputs, .B = 1, .T = n},
                   .recompute = shape.recompute,
                   .stream = stream_});
    const Buf last = memory_.logits.slice(size_t(n - 1) * o_.model.Vp(), size_t(o_.model.V));
    const std::vector<double> d = download(k_, last, stream_);
    return {d.begin(), d.end()};
}
