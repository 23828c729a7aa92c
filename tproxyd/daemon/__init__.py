"""The process around an interceptor: command line, start and stop, signals, logs. Signals and stdout are touched only here."""
