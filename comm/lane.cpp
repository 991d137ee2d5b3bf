#include "comm/lane.h"

#include <omp.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/owners.h"

namespace {
bool host_moves(const Group& group) { return group.size() > 1 && group.device().needs_host(); }

class AtGive final : public Lane {
  public:
    explicit AtGive(const Group& group) : group_(group) {}
    const Group& group() const override { return group_; }
    void give(Work work, Stream compute) override { work(compute); }
    void join(Stream) override {}
    bool needs_host() const override { return host_moves(group_); }

  private:
    const Group& group_;
};

class AtJoin final : public Lane {
  public:
    explicit AtJoin(const Group& group) : group_(group) {}
    const Group& group() const override { return group_; }
    void begin_step() override { is_new_step_ = true; }
    void give(Work work, Stream) override {
        if (std::exchange(is_new_step_, false)) work_.clear();
        work_.push_back(std::move(work));
    }
    void join(Stream compute) override {
        for (const Work& work : work_) work(compute);
    }
    bool needs_host() const override { return host_moves(group_); }

  private:
    const Group& group_;
    std::vector<Work> work_;  // of this step, or of the last one that gave any
    bool is_new_step_ = true;
};

class SecondStream final : public Lane {
  public:
    explicit SecondStream(const Group& group) : group_(group), stream_(group.backend()) {}
    const Group& group() const override { return group_; }
    void give(Work work, Stream compute) override {
        given_ = true;
        group_.backend().wait_for_stream(stream_.get(), compute);
        work(stream_.get());
    }
    void join(Stream compute) override {
        if (std::exchange(given_, false)) group_.backend().wait_for_stream(compute, stream_.get());
    }
    bool needs_host() const override { return false; }

  private:
    const Group& group_;
    const StreamOwner stream_;
    bool given_ = false;  // since the last join()
};

// The backend's work is done when a call returns, so that the thread may begin at once.
class Thread final : public Lane {
  public:
    explicit Thread(const Group& group) : group_(group.split(0, group.rank())), thread_([this] { run(); }) {}
    ~Thread() override {
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
            if (!work_.empty()) group_.host().set_timeout(0);  // an error has left other ranks' messages behind
        }
        changed_.notify_all();
        thread_.join();
    }
    const Group& group() const override { return group_; }
    void give(Work work, Stream) override {
        {
            const std::lock_guard lock(mutex_);
            work_.push_back(std::move(work));
        }
        changed_.notify_all();
    }
    void join(Stream) override {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return work_.empty(); });
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }
    bool needs_host() const override { return true; }

  private:
    void run() {
        omp_set_num_threads(1);  // the other cores are computing
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [&] { return stop_ || !work_.empty(); });
            if (work_.empty()) return;
            const Work work = work_.front();
            lock.unlock();
            try {
                if (!error_) work(nullptr);  // after a failure other ranks' messages do not fit any more
            } catch (...) { error_ = std::current_exception(); }
            lock.lock();
            work_.pop_front();
            if (work_.empty()) changed_.notify_all();
        }
    }

    const Group group_;  // its own
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Work> work_;     // the first is being done
    std::exception_ptr error_;  // written by the thread, read when work_ is empty
    bool stop_ = false;
    std::thread thread_;  // last: it uses the others
};
}  // namespace

std::unique_ptr<Lane> make_lane(const Group& group, bool beside, Otherwise otherwise) {
    if (beside && group.size() > 1 && !group.device().needs_host()) return std::make_unique<SecondStream>(group);
    if (beside && group.size() > 1 && group.backend().host_addressable) return std::make_unique<Thread>(group);
    switch (otherwise) {
        case Otherwise::at_give:
            return std::make_unique<AtGive>(group);
        case Otherwise::at_join:
            break;
    }
    return std::make_unique<AtJoin>(group);
}
