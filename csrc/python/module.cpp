// The module maskattn._native.
#include <dlfcn.h>

#include <string>

#include "python/bindings.hpp"
#include "runtime/threads.hpp"

namespace {

// Shares the team of the OpenMP runtime in this file, if the process has loaded it; returns whether it has.
bool share_team_of(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) return false;
    void* parallel = dlsym(handle, "GOMP_parallel");
    if (parallel == nullptr) {
        dlclose(handle);
        return false;
    }
    maskattn::share_team(reinterpret_cast<maskattn::ParallelRegion>(parallel));  // the open handle keeps the library loaded
    return true;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The C++ kernels of maskattn.";
    maskattn::bind_attention(module);
    maskattn::bind_coverage(module);
    maskattn::bind_encoder(module);
    maskattn::bind_packing(module);
    maskattn::bind_pictures(module);
    maskattn::bind_readout(module);
    module.def("share_team", &share_team_of, pybind11::arg("library"),
               R"(Run on the threads of an OpenMP runtime that this process has loaded; True if it was found.

Two pools would take each other's cores, since such a runtime's threads spin for a while after a job. Without one, and
in a child of fork(), the extension's own threads run.

Args:
    library: the runtime's file, GNU's or one that speaks its calls.)");
}
