"""The numbers and files of CONTA; works from a Python prompt, with no server and no tracker.

Rooms, lower first: config, errors, records, store, observe and seeding; data and models; causal,
seeds, expansion and evaluation, which never see each other; training; stages, where files meet
numbers.
"""

import os

# OpenMP's threads wait in a loop that burns the core which the thread they wait for needs, as soon
# as anything else runs on the machine: a training step then takes ten times as long. It has to be
# said before torch is imported; what the user has set wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
