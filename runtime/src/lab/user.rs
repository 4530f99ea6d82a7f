//! Users of the machine, read from /etc/passwd by hand: a static program has no name service to ask.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::LabError;

/// A user that daemons and commands of a lab run as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id; no other group is taken along.
    pub gid: u32,
    /// Home directory.
    pub home: PathBuf,
}

impl User {
    /// Finds a user by name or number. `root` and `0` are `None`: nothing changes then. A number without an entry is a
    /// user too (with a group of that number and no home).
    pub fn find(who: &str) -> Result<Option<Self>, LabError> {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let found = Self::find_in(&passwd, who).ok_or_else(|| LabError::NoUser(who.to_owned()))?;
        Ok((found.uid != 0).then_some(found))
    }

    fn find_in(passwd: &str, who: &str) -> Option<Self> {
        let number: Option<u32> = who.parse().ok();
        passwd
            .lines()
            .filter_map(Self::parse)
            .find(|u| u.name == who || Some(u.uid) == number)
            .or_else(|| {
                number.map(|uid| Self {
                    name: format!("user{uid}"),
                    uid,
                    gid: uid,
                    home: PathBuf::from("/"),
                })
            })
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = PathBuf::from(fields.nth(1)?);
        Some(Self { name, uid, gid, home })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_users_by_name_and_number() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nada:x:1000:100:Ada,,,:/home/ada:/bin/sh\nbroken\n";
        let ada = User {
            name: "ada".into(),
            uid: 1000,
            gid: 100,
            home: "/home/ada".into(),
        };
        assert_eq!(User::find_in(passwd, "ada"), Some(ada.clone()));
        assert_eq!(User::find_in(passwd, "1000"), Some(ada));
        assert_eq!(
            User::find_in(passwd, "4711").map(|u| (u.uid, u.gid)),
            Some((4711, 4711))
        );
        assert_eq!(User::find_in(passwd, "eve"), None);
    }
}
