"""A timer that measures nothing, for tests of the benchmark."""


class FakeTimer:
    """Calls every launch once, in whatever rounds; the n-th timed call takes n microseconds."""

    def __init__(self):
        self.calls, self.called = 0, []

    def call(self, launch):
        if not any(launch is other for other in self.called):
            launch()
            self.called.append(launch)

    def time_rotation(self, launches):
        for launch in launches:
            self.call(launch)
        return 7.0

    def time_call(self, launch, about_us):
        self.call(launch)
        self.calls += 1
        return float(self.calls)

    def time_batches(self, launch, counts, batches):
        times = []
        for batch in batches:
            counts.copy_(batch)
            launch()
            self.calls += 1
            times.append(float(self.calls))
        return times
