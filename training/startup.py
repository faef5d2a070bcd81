"""What a program does before its imports, which take seconds: text is UTF-8, and Ctrl-C ends it without a traceback."""

import os
import signal
import sys

if sys.getfilesystemencoding() != "utf-8":  # names of folders and classes may hold any letter
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run.one_line_errors`
