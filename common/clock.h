// Monotonic time for durations and wall-clock time for records.
#pragma once
#include <chrono>
#include <string>

class Stopwatch {
  public:
    double ms() const { return std::chrono::duration<double, std::milli>(Clock::now() - start_).count(); }
    // Milliseconds since the last lap (or the start), and starts the next lap.
    double lap_ms() {
        const auto now = Clock::now();
        const double ms = std::chrono::duration<double, std::milli>(now - lap_).count();
        lap_ = now;
        return ms;
    }

  private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point start_ = Clock::now(), lap_ = start_;
};

std::string utc_now();                       // "2026-11-22T03:04:05Z"
std::string human_duration(double seconds);  // "1h02m", "3m05s", "12s"
