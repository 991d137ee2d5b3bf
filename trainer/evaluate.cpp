#include "trainer/evaluate.h"

#include <vector>

EvalResult evaluate(Session& model, Comm& comm, uint64_t n_sequences, const ReadSequence& read) {
    const uint64_t B = uint64_t(model.shape().B), T = uint64_t(model.shape().T), size = uint64_t(comm.size());
    const uint64_t n_batches = (n_sequences + B - 1) / B, rounds = (n_batches + size - 1) / size;
    std::vector<int32_t> inputs(B * T), targets(B * T);
    std::vector<Session::Score> mine(rounds * B);  // (rounds, B)
    for (uint64_t round = 0; round < rounds; round++) {
        const uint64_t batch = round * size + uint64_t(comm.rank());
        if (batch >= n_batches && !model.needs_all_ranks()) continue;
        for (uint64_t b = 0; b < B; b++)  // the last batches are filled up with repeats, which are not counted
            read((batch * B + b) % n_sequences, {&inputs[b * T], T}, {&targets[b * T], T});
        std::ranges::copy(model.score(inputs, targets), mine.begin() + ptrdiff_t(round * B));
    }
    std::vector<Session::Score> all(mine.size() * size);  // (size, rounds, B)
    comm.all_gather(mine.data(), all.data(), mine.size() * sizeof(Session::Score));
    double loss = 0, correct = 0;
    for (uint64_t i = 0; i < n_sequences; i++) {  // global sequence order, whatever the number of ranks
        const uint64_t batch = i / B;
        const Session::Score& score = all[(batch % size * rounds + batch / size) * B + i % B];
        loss += score.loss;
        correct += score.correct;
    }
    const double tokens = double(n_sequences * T);
    return {.loss = loss / tokens, .accuracy = correct / tokens, .tokens = n_sequences * T};
}
