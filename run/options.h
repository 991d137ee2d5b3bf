// Translates the config into the trainer's options; no other file does.
#pragma once
#include "run/context.h"
#include "trainer/options.h"
#include "trainer/schedule.h"

DType real_of(Precision precision);
ModelConfig model_config(const Config& c);
// To run the model forward, in batches of B sequences, with the bits of its training.
ActivationShape forward_shape(const Config& c, int B);
// To train the model.
TrainerOptions training_options(const Context& x);
Schedule schedule_of(const Config& c, int64_t total_steps);
