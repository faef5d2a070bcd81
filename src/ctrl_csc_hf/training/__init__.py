"""`ctrl-csc train` and `ctrl-csc evaluate`: settings, images and their order, phases of a run, measurements."""
