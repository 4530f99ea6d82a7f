//! `mosd.toml`.
//!
//! Every key has a default, so that an empty file, or none, is a configuration. An unknown key is an error that names its
//! line: a misspelt limit must not look like one that is kept.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::cluster::store::StateDir;
use crate::pagestore;
use crate::rundir;
use crate::supervisor::SupervisorLimits;

/// UDP port of a daemon, unless it is told another.
pub const DEFAULT_PORT: u16 = 7117;

/// What a new `mosd.toml` looks like: every key with its default, commented out.
pub const TEMPLATE: &str = r#"# Configuration of mosd, the mosrun daemon. Every key is optional; the defaults are shown.

[node]
# Address and UDP port on which other nodes reach this one.
#listen = "0.0.0.0:7117"
# What other nodes are told to dial, when it is not what they see.
#advertise = "192.0.2.1:7117"
# Nodes to ask when none of those known from before answers.
#seeds = ["192.0.2.2:7117"]
# Certificates, keys, and the nodes known from before. (A user's own daemon: ~/.local/state/mosrun)
#state_dir = "/var/lib/mosrun"
# Sockets. (A user's own daemon: $XDG_RUNTIME_DIR/mosrun, else /tmp/mosrun-UID)
#rundir = "/run/mosrun"

[guests]
# Whether programs may come here: "all"; "named", only when somebody names this node; "none".
#accept = "all"
# Added to their nice value, 0 to 19.
#nice = 5
# Jobs here at a time, processes of one job, and memory of one job ("512MiB", "4GiB"). No limit by default.
#max_jobs = 100
#max_processes = 1000
#max_memory = "4GiB"
# Whether a daemon that is not root takes jobs of other users (they all run as its own user).
#other_users = false

[store]
# What of a user's programs has been here is kept, so that it need not be sent again: so much for each user, on the disk.
# "0" is nothing, and removes what is there; else from "1MiB" to "16GiB".
#limit = "256MiB"
# Where. (A user's own daemon: $XDG_CACHE_HOME/mosrun, else ~/.cache/mosrun)
#dir = "/var/cache/mosrun"

[load]
# Speed of a core, 1000 being the reference. Measured when not given.
#speed = 1000
# How often the load is told to others, in milliseconds.
#report_ms = 500

[membership]
# A node is probed this often, and declared down when it has been suspect for this long, in milliseconds.
#probe_ms = 1000
#suspect_ms = 4000

[log]
# error, warn, info, debug or trace; or a filter such as "info,runtime::daemon=debug"
#level = "info"
# Where to, instead of standard error.
#file = "/var/log/mosd.log"
"#;

/// The configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// It says something that cannot be.
    #[error("{}:{line}: {message}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
}

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[node]`
    pub node: NodeConfig,
    /// `[guests]`
    pub guests: GuestConfig,
    /// `[store]`
    pub store: PageStoreConfig,
    /// `[load]`
    pub load: LoadConfig,
    /// `[membership]`
    pub membership: MembershipConfig,
    /// `[log]`
    pub log: LogConfig,
    /// The file it was read from.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

/// `[node]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// What others are told to dial.
    pub advertise: Option<SocketAddr>,
    /// Nodes to ask when all else fails.
    pub seeds: Vec<SocketAddr>,
    /// State directory.
    pub state_dir: Option<PathBuf>,
    /// Directory of sockets.
    pub rundir: Option<PathBuf>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT));
        NodeConfig {
            listen,
            advertise: None,
            seeds: Vec::new(),
            state_dir: None,
            rundir: None,
        }
    }
}

/// Who may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accept {
    /// Everybody.
    All,
    /// Jobs for which somebody named this node.
    Named,
    /// Nobody.
    None,
}

/// `[guests]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestConfig {
    /// Who may come.
    pub accept: Accept,
    /// Added to the guests' nice value.
    #[serde(deserialize_with = "nice")]
    pub nice: i32,
    /// Jobs at a time.
    pub max_jobs: Option<u32>,
    /// Processes of one job.
    pub max_processes: Option<u32>,
    /// Memory of one job, in bytes.
    #[serde(deserialize_with = "size")]
    pub max_memory: Option<u64>,
    /// Whether a daemon that is not root serves other users.
    pub other_users: bool,
}

impl Default for GuestConfig {
    fn default() -> Self {
        let accept = Accept::All;
        GuestConfig {
            accept,
            nice: 5,
            max_jobs: None,
            max_processes: None,
            max_memory: None,
            other_users: false,
        }
    }
}

impl GuestConfig {
    /// What a supervisor is told.
    pub fn limits(&self) -> SupervisorLimits {
        SupervisorLimits {
            nice: self.nice,
            max_guests: self.max_processes,
            max_memory_bytes: self.max_memory,
        }
    }
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PageStoreConfig {
    /// What the page store of a user may take, in bytes; 0: there is none.
    #[serde(rename = "limit", deserialize_with = "store_size")]
    pub limit_bytes: u64,
    /// Where the page stores are.
    pub dir: Option<PathBuf>,
}

impl Default for PageStoreConfig {
    fn default() -> Self {
        PageStoreConfig {
            limit_bytes: 256 << 20,
            dir: None,
        }
    }
}

/// `[load]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadConfig {
    /// Speed of a core.
    pub speed: Option<u32>,
    /// Time between two reports.
    #[serde(rename = "report_ms", deserialize_with = "milliseconds")]
    pub report: Duration,
}

impl Default for LoadConfig {
    fn default() -> Self {
        LoadConfig {
            speed: None,
            report: Duration::from_millis(500),
        }
    }
}

/// `[membership]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MembershipConfig {
    /// Time between two probes.
    #[serde(rename = "probe_ms", deserialize_with = "milliseconds")]
    pub probe: Duration,
    /// Time from suspect to down.
    #[serde(rename = "suspect_ms", deserialize_with = "milliseconds")]
    pub suspect: Duration,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        MembershipConfig {
            probe: Duration::from_secs(1),
            suspect: Duration::from_secs(4),
        }
    }
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// What to log.
    pub level: String,
    /// Where to.
    pub file: Option<PathBuf>,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig {
            level: "info".into(),
            file: None,
        }
    }
}

fn milliseconds<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    match u64::deserialize(from)? {
        ms @ 50..=600_000 => Ok(Duration::from_millis(ms)),
        other => Err(serde::de::Error::custom(format!(
            "{other} is not between 50 and 600000 milliseconds"
        ))),
    }
}

fn nice<'de, D: Deserializer<'de>>(from: D) -> Result<i32, D::Error> {
    match i32::deserialize(from)? {
        nice @ 0..=19 => Ok(nice),
        other => Err(serde::de::Error::custom(format!(
            "{other} is not between 0 and 19"
        ))),
    }
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    match parse_size(&text) {
        Some(bytes) if bytes > 0 => Ok(Some(bytes)),
        _ => Err(no_size(&text)),
    }
}

fn store_size<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    match parse_size(&text) {
        Some(bytes @ (0 | pagestore::MIN_BYTES..=pagestore::MAX_BYTES)) => Ok(bytes),
        Some(_) => Err(serde::de::Error::custom(format!(
            "{text:?} is neither \"0\" nor between \"1MiB\" and \"16GiB\""
        ))),
        None => Err(no_size(&text)),
    }
}

fn no_size<E: serde::de::Error>(text: &str) -> E {
    E::custom(format!(
        "{text:?} is no size: write \"512MiB\" or \"4GiB\", for example"
    ))
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => Some(0),
        "KiB" | "K" => Some(10),
        "MiB" | "M" => Some(20),
        "GiB" | "G" => Some(30),
        "TiB" | "T" => Some(40),
        _ => None,
    };
    unit.and_then(|shift| digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift))
}

impl Config {
    /// The usual place: `/etc/mosrun/mosd.toml` for root, else `$XDG_CONFIG_HOME/mosrun/mosd.toml` or
    /// `~/.config/mosrun/mosd.toml`.
    pub fn default_path() -> PathBuf {
        if nix::unistd::geteuid().is_root() {
            return "/etc/mosrun/mosd.toml".into();
        }
        rundir::of_user("XDG_CONFIG_HOME", ".config")
            .unwrap_or_else(|| "/etc/mosrun".into())
            .join("mosd.toml")
    }

    /// Reads the file at `path`, which must exist; without one, the file at the usual place, if there is one.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let chosen = path.map_or_else(Self::default_path, Path::to_owned);
        match std::fs::read_to_string(&chosen) {
            Ok(text) => Self::parse(&text, &chosen),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && path.is_none() => Ok(Config::default()),
            Err(source) => Err(ConfigError::Read { path: chosen, source }),
        }
    }

    /// Reads the text of a file called `path`.
    ///
    /// # Errors
    /// [`ConfigError::Content`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let error = |line, message: String| ConfigError::Content {
            path: path.to_owned(),
            line,
            message,
        };
        let mut config: Config = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start).min(text.len());
            let line = 1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
            error(line, e.message().to_string())
        })?;
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        config.file = Some(absolute(path.to_owned()));
        for path in [
            &mut config.node.state_dir,
            &mut config.node.rundir,
            &mut config.store.dir,
            &mut config.log.file,
        ]
        .into_iter()
        .flatten()
        {
            *path = absolute(std::mem::take(path));
        }
        let line_of = |key: &str| {
            1 + text
                .lines()
                .position(|l| l.trim_start().starts_with(key))
                .unwrap_or(0)
        };
        if let Some(advertise) = config.node.advertise
            && (advertise.ip().is_unspecified() || advertise.port() == 0)
        {
            return Err(error(
                line_of("advertise"),
                format!("nobody can dial {advertise}"),
            ));
        }
        if config.membership.suspect < config.membership.probe {
            let message = "suspect_ms must not be shorter than probe_ms".to_string();
            return Err(error(line_of("suspect_ms"), message));
        }
        if let Err(e) = tracing_subscriber::EnvFilter::try_new(&config.log.level) {
            return Err(error(
                line_of("level"),
                format!("{:?} is no log filter: {e}", config.log.level),
            ));
        }
        Ok(config)
    }

    /// Where the page stores of users are.
    pub fn store_dir(&self) -> PathBuf {
        self.store.dir.clone().unwrap_or_else(pagestore::default_dir)
    }

    /// The state directory.
    pub fn state_dir(&self) -> StateDir {
        StateDir::new(self.node.state_dir.clone().unwrap_or_else(StateDir::default_path))
    }

    /// The directory of sockets. `$MOSRUN_RUNDIR` wins over the file, so that a daemon and the programs that are to find
    /// it can be told with one word.
    pub fn rundir(&self) -> PathBuf {
        let told = std::env::var_os("MOSRUN_RUNDIR").is_some_and(|v| !v.is_empty());
        self.node
            .rundir
            .clone()
            .filter(|_| !told)
            .unwrap_or_else(rundir::path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("m.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn nothing_is_a_configuration_and_so_is_the_template() {
        let defaults = Config {
            file: Some(std::path::absolute("m.toml").unwrap()),
            ..Config::default()
        };
        assert_eq!(parse("").unwrap(), defaults);
        assert_eq!(parse(TEMPLATE).unwrap(), defaults);
        // with every key taken at its word: they must exist
        let uncommented: String = TEMPLATE
            .lines()
            .map(|l| {
                l.strip_prefix('#')
                    .filter(|l| !l.starts_with(' '))
                    .unwrap_or(l)
                    .to_string()
                    + "\n"
            })
            .collect();
        let all = parse(&uncommented).unwrap();
        assert_eq!(all.guests.max_memory, Some(4 << 30));
        assert_eq!(all.store.limit_bytes, defaults.store.limit_bytes);
        assert_eq!(parse("[store]\nlimit = \"0\"").unwrap().store.limit_bytes, 0);
        assert_eq!(
            parse("[store]\nlimit = \"1GiB\"").unwrap().store.limit_bytes,
            1 << 30
        );
        let same = Config {
            log: defaults.log.clone(),
            guests: defaults.guests.clone(),
            ..all.clone()
        };
        assert_eq!(
            (same.load.report, same.membership),
            (defaults.load.report, defaults.membership)
        );
        assert_eq!(all.node.listen, defaults.node.listen);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, line, word) in [
            ("[node]\n\nlissten = \"1.2.3.4:5\"", 3, "lissten"),
            ("[nodes]\n", 1, "nodes"),
            ("\n[node]\nlisten = \"here\"", 3, "address"),
            ("[guests]\nnice = 40", 2, "between 0 and 19"),
            ("[guests]\nmax_memory = \"much\"", 2, "no size"),
            ("[guests]\naccept = \"some\"", 2, "some"),
            ("[store]\nlimit = \"1KiB\"", 2, "between"),
            ("[store]\nlimit = \"17GiB\"", 2, "between"),
            ("[store]\nlimit = \"\"", 2, "no size"),
            ("[store]\nlimit = 5", 2, "string"),
            ("[store]\n\nsize = \"1MiB\"", 3, "size"),
            ("[membership]\nprobe_ms = 1", 2, "between"),
            ("[membership]\nprobe_ms = 9000\nsuspect_ms = 1000", 3, "shorter"),
            ("[node]\nadvertise = \"0.0.0.0:1\"", 2, "dial"),
            ("[log]\nlevel = \"a=b=c\"", 2, "filter"),
            ("[node\n", 1, ""),
        ] {
            let error = parse(text).expect_err(text);
            assert!(
                error.starts_with(&format!("m.toml:{line}: ")) && error.contains(word),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn a_file_that_was_named_must_exist() {
        let missing = Config::load(Some(Path::new("/nonexistent/mosd.toml"))).unwrap_err();
        assert!(missing.to_string().starts_with("/nonexistent/mosd.toml: "));
    }
}
