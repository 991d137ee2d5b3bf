// The words that the config's model.architecture may be.
#pragma once
#include <string>
#include <vector>

// In the order of the table that defines them: model/architecture.cpp.
std::vector<std::string> architecture_names();
