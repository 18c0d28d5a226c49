#!/usr/bin/env bash
# The first call, about 190 s on an H100: does everything run, is it right, and how far is the plain forward from its
# floor. REHEARSE=1 runs the same steps on a CPU. A step that a fused kernel or a captured graph needs joins here.
. "$(dirname "$0")/steps.sh"
begin first 280
step 30 versions
step 150 build & # from source, while the build that was carried is in use
step 90 device_tests
step 30 operators
step 30 decoders
step 40 places
wait # for the build: from here on times are taken
step 90 forwards
step 30 kernels
step 60 counters
table
