#include "trainer/schedule.h"

#include <algorithm>
#include <cmath>

namespace {
double blend(const Schedule& c, double weight) {
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * weight;
}
}  // namespace

double learning_rate_at(const Schedule& c, int64_t s) {
    if (s < c.warmup_steps) return c.learning_rate * double(s + 1) / double(c.warmup_steps);
    if (c.kind == ScheduleKind::constant) return c.learning_rate;
    const int64_t last = c.total_steps - 1;
    if (c.kind == ScheduleKind::wsd) {
        const int64_t fall = c.decay_steps > 0 ? c.decay_steps : std::max<int64_t>(1, c.total_steps / 5);
        return blend(c, std::clamp(double(last - s) / double(fall), 0.0, 1.0));
    }
    const int64_t end = c.decay_steps > 0 ? c.decay_steps : last;
    const double progress = end > c.warmup_steps ? double(s - c.warmup_steps) / double(end - c.warmup_steps) : 1.0;
    const double p = std::clamp(progress, 0.0, 1.0);
    return blend(c, c.kind == ScheduleKind::linear ? 1 - p : 0.5 * (1 + std::cos(M_PI * p)));
}
