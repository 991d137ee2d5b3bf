// Translates the config into the trainer's options; no other file does.
#pragma once
#include "run/context.h"
#include "trainer/options.h"
#include "trainer/schedule.h"

// model_options: to run a model; training_options: to run and train a model.
TrainerOptions model_options(const Context& x);
TrainerOptions training_options(const Context& x);
Schedule schedule_of(const Config& c, int64_t total_steps);
