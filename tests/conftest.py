"""What every test process needs before torch and numpy are imported."""

from __future__ import annotations

import os
import resource

from hypothesis import HealthCheck, settings

# Tests run beside worker processes: threads that wait have to sleep, not to spin on a core that another one needs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as pocd.process
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests that hold a thousand connections open are at both ends of them.
_, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _most))

# How long an example takes, or takes to be drawn, says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
