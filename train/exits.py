"""How a run ends other than by an error: exit codes, which `argot supervise` and launchers go by.

0    done                             65   the input or the model is unstable: the same command would end the same way
1    an error, said on the terminal   70   a step did not end in `config.train.watchdog_seconds`
3    done; a rule of `config.gate`    75   stopped when asked to, saved: the same command goes on
     is not met                       130  stopped at once (Ctrl-C twice)
"""

EXIT_UNSTABLE, EXIT_STUCK, EXIT_STOPPED, EXIT_AT_ONCE = 65, 70, 75, 130  # the first three as in sysexits.h
EXIT_GATE = 3


class Stopped(Exception):
  """A run that ended before its last step, in good order, on all processes alike.

  Args:
    message: why, and what to do.
    code: exit code.
  """

  def __init__(self, message: str, code: int = EXIT_STOPPED):
    super().__init__(message)
    self.code = code
