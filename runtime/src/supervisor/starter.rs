//! Starting threads for the tracer.
//!
//! The tracer makes the cage, so it must not be confined ([`shim::confine`]), and a thread inherits from the thread that makes
//! it. So the tracer makes none itself: it asks the main thread, which is confined as all others are.

use std::any::Any;

use crossbeam_channel::{Receiver, Sender};
use shim::confine::{self, Role};

/// What the main thread is asked.
enum Ask {
    Start(&'static str, Box<dyn FnOnce() + Send>),
    /// The tracer has ended with this result.
    Ended(std::thread::Result<anyhow::Result<()>>),
}

/// Starts threads that are confined.
#[derive(Clone)]
pub struct Starter(Sender<Ask>);

impl Starter {
    /// Has a thread started. When the system has no more threads `work` is dropped, which is logged.
    pub fn start(&self, name: &'static str, work: impl FnOnce() + Send + 'static) {
        // The main thread lives as long as anybody.
        let _ = self.0.send(Ask::Start(name, Box::new(work)));
    }
}

/// Bytes of stack for threads of a supervisor.
const STACK_BYTES: usize = 512 << 10;

/// Confines the calling thread and serves those who want threads, while `free` runs on a thread that is not confined. It is
/// given what `confined` made. Returns when it has ended, with its result.
///
/// # Errors
/// Those of the two, and when there is no thread.
pub fn run<T: Send + 'static>(
    confined: impl FnOnce(Starter) -> anyhow::Result<T>,
    free: impl FnOnce(T) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let (asks, asked) = crossbeam_channel::unbounded();
    let (give, given) = crossbeam_channel::bounded::<T>(1);
    let done = asks.clone();
    std::thread::Builder::new().name("tracer".into()).spawn(move || {
        let Ok(made) = given.recv() else { return };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| free(made)));
        let _ = done.send(Ask::Ended(result));
    })?;
    if let Err(e) = confine::this_thread(Role::Supervisor) {
        tracing::warn!(error = %e, "the supervisor is not confined");
    }
    let made = confined(Starter(asks))?;
    let _ = give.send(made);
    serve(&asked)
}

fn serve(asked: &Receiver<Ask>) -> anyhow::Result<()> {
    for ask in asked {
        match ask {
            Ask::Start(name, work) => {
                let started = std::thread::Builder::new()
                    .name(name.into())
                    .stack_size(STACK_BYTES)
                    .spawn(work);
                if let Err(e) = started {
                    tracing::error!(error = %e, "no thread for {name}");
                }
            }
            Ask::Ended(Ok(result)) => return result,
            Ask::Ended(Err(panic)) => anyhow::bail!("the tracer panicked: {}", message(&*panic)),
        }
    }
    Ok(())
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters() -> u32 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("Seccomp_filters:"));
        line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    }

    #[test]
    fn all_threads_are_confined_but_the_free_one() {
        let before = filters();
        let main = std::thread::spawn(move || {
            run(
                |starter| Ok((starter, filters())),
                move |(starter, confined)| {
                    let (say, said) = crossbeam_channel::bounded(1);
                    starter.start("started", move || {
                        let _ = say.send(filters());
                    });
                    assert_eq!(
                        (filters(), confined, said.recv()?),
                        (before, before + 1, before + 1)
                    );
                    Ok(())
                },
            )
        });
        main.join().unwrap().unwrap();
    }

    #[test]
    fn a_tracer_that_panics_is_an_error() {
        let main = std::thread::spawn(|| run(|_| Ok(()), |()| panic!("lost")));
        let error = main.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("lost"), "{error}");
    }
}
