//! The thread that starts supervisors.
//!
//! The daemon's other threads are confined ([`shim::confine`]) and may not execute programs; and what they would start would be
//! confined as they are, which a supervisor's guests must not be.

use std::io;
use std::process::{Child, Command};
use std::sync::mpsc;

use tokio::sync::oneshot;

type Wish = (Command, oneshot::Sender<io::Result<Child>>);

/// Starts programs on a thread that is not confined.
#[derive(Debug)]
pub struct Spawner(mpsc::Sender<Wish>);

impl Spawner {
    /// Starts the thread. To be called from a thread that is not confined.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start() -> io::Result<Spawner> {
        let (wish, wishes) = mpsc::channel::<Wish>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in wishes {
                    let _ = answer.send(command.spawn());
                }
            })?;
        Ok(Spawner(wish))
    }

    /// Starts a program.
    ///
    /// # Errors
    /// Those of fork(2) and execve(2).
    pub async fn spawn(&self, command: Command) -> io::Result<Child> {
        let (answer, answered) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts programs has ended");
        self.0.send((command, answer)).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}
