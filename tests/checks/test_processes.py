from fcclip.checks.processes import DIED, map_in_processes

KILLERS = ("__import__('os')._exit(3)", "__import__('os').kill(__import__('os').getpid(), 9)")


def test_jobs_that_kill_their_process_are_named_and_the_others_are_done():
    jobs = ["1 + 1", KILLERS[0], "2 + 2", KILLERS[1], "3", *map(str, range(10))]
    results = dict(map_in_processes(eval, jobs, workers=2, chunk=3))
    assert results == {0: 2, 1: DIED, 2: 4, 3: DIED, 4: 3, **{5 + number: number for number in range(10)}}


def test_without_processes_the_work_is_done_here():
    assert list(map_in_processes(eval, ["1 + 1", "3"], workers=0, chunk=1)) == [(0, 2), (1, 3)]


def test_jobs_are_taken_as_they_are_needed():
    taken = []
    jobs = (taken.append(number) or str(number) for number in range(1000))
    results = map_in_processes(eval, jobs, workers=1, chunk=4)
    next(results)
    assert len(taken) == 4
    results.close()
