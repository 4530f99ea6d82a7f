//! What a node sees of files: node 1 this machine's, the others a nearly empty root of their own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use super::LabError;
use super::cluster::Placed;
use super::user::User;

/// The programs of this product, which every node has on its PATH.
pub const PROGRAMS: [&str; 3] = ["mosrun", "mosd", "mosctl"];
/// Other names of `mosctl`.
pub const ALIASES: [&str; 3] = ["mosps", "mosmigrate", "mosmon"];
/// Devices of a node with its own root.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// What the first process of a node has to set up. Travels as one line of JSON from `lab up`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Files {
    /// Whether the node sees this machine's files.
    pub machine: bool,
    /// Hostname of the node.
    pub hostname: String,
    /// Where the node's own root is put together: an empty directory of the lab.
    pub scratch: PathBuf,
    /// The node's run directory, as seen inside of it.
    pub rundir: PathBuf,
    /// Directory of the programs.
    pub programs: PathBuf,
    /// Addresses and names of all nodes.
    pub hosts: Vec<(String, String)>,
    /// What is put into the run directory.
    pub placed: Vec<Placed>,
    /// Who owns the run directory, if not root.
    pub user: Option<User>,
}

impl Files {
    /// Where the programs are inside the node.
    pub fn bin(&self) -> PathBuf {
        if self.machine {
            self.rundir.join("bin")
        } else {
            PathBuf::from("/usr/bin")
        }
    }

    /// Sets up the files of the calling process's mount namespace, which must be its own, and a process of the node's
    /// pid namespace. Nothing of it reaches other mount namespaces.
    pub fn set_up(&self) -> Result<(), LabError> {
        if self.machine {
            self.share_machine()
        } else {
            self.own_root()
        }
    }

    fn share_machine(&self) -> Result<(), LabError> {
        // Later mounts of the machine appear here, and ours not there.
        propagate(MsFlags::MS_SLAVE)?;
        attach(
            "proc",
            "proc",
            Path::new("/proc"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            "",
        )?;
        attach(
            "mosrun",
            "tmpfs",
            &self.rundir,
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=755",
        )?;
        self.own_rundir(Path::new("/"))?;
        self.lay_programs(Path::new("/"))
    }

    fn own_root(&self) -> Result<(), LabError> {
        propagate(MsFlags::MS_PRIVATE)?;
        let root = self.scratch.as_path();
        attach("root", "tmpfs", root, MsFlags::MS_NODEV, "mode=755")?;
        for dir in [
            "dev", "dev/pts", "dev/shm", "etc", "proc", "root", "run", "sys", "tmp", "usr", "usr/bin", "var",
        ] {
            make_dir(&root.join(dir))?;
        }
        for (link, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/bin"),
            ("var/run", "/run"),
            ("var/tmp", "/tmp"),
        ] {
            make_link(Path::new(target), &root.join(link))?;
        }
        set_mode(&root.join("tmp"), 0o1777)?;
        self.own_rundir(root)?;
        self.lay_etc(root)?;
        self.lay_dev(root)?;
        self.lay_programs(root)?;
        let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        attach("proc", "proc", &root.join("proc"), quiet, "")?;
        attach(
            "sysfs",
            "sysfs",
            &root.join("sys"),
            quiet | MsFlags::MS_RDONLY,
            "",
        )?;
        // pivot_root(2): with both names the same directory, the old root ends up on top of the new one, and leaves.
        std::env::set_current_dir(root).map_err(LabError::system("entering the new root"))?;
        nix::unistd::pivot_root(".", ".").map_err(LabError::system("pivot_root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(LabError::system("letting go of the old root"))?;
        std::env::set_current_dir("/").map_err(LabError::system("entering /"))
    }

    fn own_rundir(&self, root: &Path) -> Result<(), LabError> {
        let rundir = under(root, &self.rundir);
        make_dir(&rundir)?;
        for Placed { path, mode, text } in &self.placed {
            let path = rundir.join(path);
            make_dir(path.parent().unwrap_or(&rundir))?;
            fs::write(&path, text).map_err(LabError::system(format!("writing {}", path.display())))?;
            set_mode(&path, *mode)?;
        }
        let state = rundir.join("state");
        if state.exists() {
            set_mode(&state, 0o700)?;
        }
        if let Some(user) = &self.user {
            give_away(&rundir, user)?;
            set_mode(&rundir, 0o700)?;
        }
        Ok(())
    }

    fn lay_etc(&self, root: &Path) -> Result<(), LabError> {
        let etc = root.join("etc");
        let mut passwd = String::from("root:x:0:0:root:/root:/bin/sh\n");
        let mut group = String::from("root:x:0:\n");
        if let Some(User { name, uid, gid, home }) = &self.user {
            passwd += &format!("{name}:x:{uid}:{gid}::{}:/bin/sh\n", home.display());
            group += &format!("{name}:x:{gid}:\n");
            let home = under(root, home);
            if fs::create_dir_all(&home).is_ok() {
                chown(&home, Some(*uid), Some(*gid))
                    .map_err(LabError::system("giving away the home directory"))?;
            }
        }
        let mut hosts = String::from("127.0.0.1 localhost\n");
        for (address, name) in &self.hosts {
            hosts += &format!("{address} {name}\n");
        }
        let hostname = format!("{}\n", self.hostname);
        for (file, text) in [
            ("passwd", &passwd),
            ("group", &group),
            ("hosts", &hosts),
            ("hostname", &hostname),
        ] {
            fs::write(etc.join(file), text).map_err(LabError::system(format!("writing /etc/{file}")))?;
        }
        Ok(())
    }

    fn lay_dev(&self, root: &Path) -> Result<(), LabError> {
        let dev = root.join("dev");
        for device in DEVICES {
            bind(&Path::new("/dev").join(device), &dev.join(device), false)?;
        }
        if Path::new(shim::userfault::DEVICE).exists() {
            bind(
                Path::new(shim::userfault::DEVICE),
                &dev.join("userfaultfd"),
                false,
            )?;
        }
        // The TUN device is not there for the guests; nothing of a node needs it.
        let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        attach(
            "devpts",
            "devpts",
            &dev.join("pts"),
            quiet,
            "newinstance,ptmxmode=0666,mode=620",
        )?;
        attach(
            "shm",
            "tmpfs",
            &dev.join("shm"),
            quiet | MsFlags::MS_NODEV,
            "mode=1777",
        )?;
        make_link(Path::new("pts/ptmx"), &dev.join("ptmx"))?;
        for (link, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "fd/0"),
            ("stdout", "fd/1"),
            ("stderr", "fd/2"),
        ] {
            make_link(Path::new(target), &dev.join(link))?;
        }
        Ok(())
    }

    /// The programs are bound file by file: a node keeps the ones it was made with when new ones are installed, and
    /// may run them even where their directory is closed to its user.
    fn lay_programs(&self, root: &Path) -> Result<(), LabError> {
        let bin = under(root, &self.bin());
        make_dir(&bin)?;
        for program in PROGRAMS {
            bind(&self.programs.join(program), &bin.join(program), true)?;
        }
        for alias in ALIASES {
            make_link(Path::new("mosctl"), &bin.join(alias))?;
        }
        Ok(())
    }
}

/// Lets a freshly made mount namespace keep its mounts to itself (`MS_PRIVATE`, or `MS_SLAVE` to go on receiving).
pub fn propagate(how: MsFlags) -> Result<(), LabError> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        how | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(LabError::system("making the mounts private"))
}

/// Mounts a file system of the given kind.
pub fn attach(source: &str, kind: &str, at: &Path, flags: MsFlags, data: &str) -> Result<(), LabError> {
    mount(
        Some(source),
        at,
        Some(kind),
        flags,
        Some(data).filter(|d| !d.is_empty()),
    )
    .map_err(LabError::system(format!("mounting {kind} on {}", at.display())))
}

fn bind(from: &Path, to: &Path, read_only: bool) -> Result<(), LabError> {
    let tried = || format!("binding {} to {}", from.display(), to.display());
    fs::File::create(to).map_err(LabError::system(tried()))?;
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(LabError::system(tried()))?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, to, None::<&str>, flags, None::<&str>).map_err(LabError::system(tried()))?;
    }
    Ok(())
}

/// Makes a directory that only the user can enter.
pub fn make_private(dir: &Path, user: &User) -> Result<(), LabError> {
    make_dir(dir)?;
    give_away(dir, user)?;
    set_mode(dir, 0o700)
}

/// Makes the user the owner of a directory and everything in it.
fn give_away(top: &Path, user: &User) -> Result<(), LabError> {
    let tried = || LabError::system(format!("giving away {}", top.display()));
    chown(top, Some(user.uid), Some(user.gid)).map_err(tried())?;
    if top.is_dir() {
        for entry in fs::read_dir(top).map_err(tried())? {
            give_away(&entry.map_err(tried())?.path(), user)?;
        }
    }
    Ok(())
}

fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn make_dir(path: &Path) -> Result<(), LabError> {
    fs::create_dir_all(path).map_err(LabError::system(format!("creating {}", path.display())))
}

fn make_link(target: &Path, link: &Path) -> Result<(), LabError> {
    symlink(target, link).map_err(LabError::system(format!("linking {}", link.display())))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), LabError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(LabError::system(format!(
        "changing the mode of {}",
        path.display()
    )))
}
