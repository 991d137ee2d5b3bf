#include "trainer/schedule.h"

#include <algorithm>
#include <cmath>

namespace {
double blend(const Schedule& c, double weight) {
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * weight;
}

// cosine, linear: from 0 at the end of the warm-up to 1 at the step that reaches the minimum.
double progress(const Schedule& c, int64_t s) {
    const int64_t end = c.decay_steps > 0 ? c.decay_steps : c.total_steps - 1;
    if (end <= c.warmup_steps) return 1;
    return std::clamp(double(s - c.warmup_steps) / double(end - c.warmup_steps), 0.0, 1.0);
}

// wsd: from 1 where the fall begins to 0 at the last step.
double share_left(const Schedule& c, int64_t s) {
    const int64_t fall = c.decay_steps > 0 ? c.decay_steps : std::max<int64_t>(1, c.total_steps / 5);
    return std::clamp(double(c.total_steps - 1 - s) / double(fall), 0.0, 1.0);
}
}  // namespace

double learning_rate_at(const Schedule& c, int64_t s) {
    if (s < c.warmup_steps) return c.learning_rate * double(s + 1) / double(c.warmup_steps);
    switch (c.kind) {
        case ScheduleKind::constant:
            return c.learning_rate;
        case ScheduleKind::cosine:
            return blend(c, 0.5 * (1 + std::cos(M_PI * progress(c, s))));
        case ScheduleKind::linear:
            return blend(c, 1 - progress(c, s));
        case ScheduleKind::wsd:
            return blend(c, share_left(c, s));
    }
    return c.learning_rate;
}
