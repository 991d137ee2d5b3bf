// Learning rates at the steps where a schedule changes, computed by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <initializer_list>

#include "trainer/schedule.h"

namespace {
Schedule schedule(ScheduleKind kind, int64_t warmup, int64_t decay) {
    return {.kind = kind,
            .learning_rate = 1.0,
            .min_learning_rate = 0.1,
            .warmup_steps = warmup,
            .decay_steps = decay,
            .total_steps = 100};
}
}  // namespace

TEST_CASE("schedule: warm-up reaches the full rate at its last step") {
    for (const ScheduleKind kind :
         {ScheduleKind::constant, ScheduleKind::cosine, ScheduleKind::linear, ScheduleKind::wsd}) {
        const Schedule s = schedule(kind, 10, 0);
        CHECK(learning_rate_at(s, 0) == doctest::Approx(0.1));
        CHECK(learning_rate_at(s, 4) == doctest::Approx(0.5));
        CHECK(learning_rate_at(s, 9) == 1.0);
        CHECK(learning_rate_at(s, 10) == 1.0);
    }
}

TEST_CASE("schedule: constant stays, without warm-up from the first step") {
    const Schedule s = schedule(ScheduleKind::constant, 0, 0);
    CHECK(learning_rate_at(s, 0) == 1.0);
    CHECK(learning_rate_at(s, 99) == 1.0);
}

// Seen to fail with: the minimum reached one step after the last.
TEST_CASE("schedule: cosine and linear reach the minimum at the last step, or at decay_steps") {
    for (const ScheduleKind kind : {ScheduleKind::cosine, ScheduleKind::linear}) {
        CHECK(learning_rate_at(schedule(kind, 19, 0), 99) == doctest::Approx(0.1));
        CHECK(learning_rate_at(schedule(kind, 19, 0), 59) == doctest::Approx(0.55));  // half-way: both at the middle
        CHECK(learning_rate_at(schedule(kind, 10, 50), 50) == doctest::Approx(0.1));
        CHECK(learning_rate_at(schedule(kind, 10, 50), 80) == doctest::Approx(0.1));
    }
    CHECK(learning_rate_at(schedule(ScheduleKind::linear, 0, 0), 33) == doctest::Approx(0.7));
    CHECK(learning_rate_at(schedule(ScheduleKind::cosine, 0, 0), 33) ==
          doctest::Approx(0.1 + 0.9 * 0.75));  // cos 60 deg
}

TEST_CASE("schedule: wsd holds and falls in equal parts at the end") {
    const Schedule fifth = schedule(ScheduleKind::wsd, 0, 0), ten = schedule(ScheduleKind::wsd, 0, 10);
    CHECK(learning_rate_at(fifth, 79) == 1.0);
    CHECK(learning_rate_at(fifth, 80) == doctest::Approx(0.1 + 0.9 * 19 / 20));
    CHECK(learning_rate_at(fifth, 99) == doctest::Approx(0.1));
    CHECK(learning_rate_at(ten, 89) == 1.0);
    CHECK(learning_rate_at(ten, 94) == doctest::Approx(0.55));
    CHECK(learning_rate_at(ten, 99) == doctest::Approx(0.1));
}
