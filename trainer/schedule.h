// Learning rate as a pure function of the step.
#pragma once
#include <cstdint>

#include "common/config_words.h"

struct Schedule {
    ScheduleKind kind = ScheduleKind::constant;
    double learning_rate = 0, min_learning_rate = 0;
    int64_t warmup_steps = 0;
    int64_t decay_steps = 0;  // 0: all
    int64_t total_steps = 0;
};

// Rate of step s, the first being 0.  lr (s+1)/warmup while s < warmup.  Then cosine and linear fall from lr at s =
// warmup to min at s = decay_steps (all: the last step) and stay there; wsd holds lr and falls in equal parts over the
// last decay_steps steps (all: a fifth of the run), reaching min at the last.
double learning_rate_at(const Schedule& schedule, int64_t s);
