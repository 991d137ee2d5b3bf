#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "test/op_test.h"

#ifndef KILN_RACE
#define KILN_RACE 0
#endif
bool checks_races() { return KILN_RACE; }
