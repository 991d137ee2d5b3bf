// MPICH's ranks spin while they wait.  Where ranks are more than cores, a spinning rank keeps the core from the rank
// that it waits for.  Over UCX, MPICH finds this function before UCX's own, and lets another rank run when nothing has
// arrived.
#include <dlfcn.h>
#include <sched.h>

extern "C" unsigned ucp_worker_progress(void* worker);

unsigned ucp_worker_progress(void* worker) {
    static const auto of_ucx = reinterpret_cast<unsigned (*)(void*)>(dlsym(RTLD_NEXT, "ucp_worker_progress"));
    const unsigned n_events = of_ucx(worker);
    if (n_events == 0) sched_yield();
    return n_events;
}
