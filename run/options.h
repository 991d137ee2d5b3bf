// From the config to the options of the trainer: the only place that translates one into the other.
#pragma once
#include "run/context.h"
#include "trainer/options.h"
#include "trainer/schedule.h"

// The options that running a model needs, and those that training it needs.
TrainerOptions model_options(const Context& x);
TrainerOptions training_options(const Context& x);
Schedule schedule_of(const Config& c, int64_t total_steps);
