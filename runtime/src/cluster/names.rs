//! Names of nodes and clusters.

/// Longest name, in bytes: that of a DNS label.
pub const MAX_NAME: usize = 63;
/// Longest host name, in bytes (`HOST_NAME_MAX` is 64).
pub const MAX_HOST: usize = 64;

/// The name cannot be a node's or a cluster's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot be a name: use 1 to {MAX_NAME} letters, digits, '-', '_' and '.', not digits alone, and not \"home\""
)]
pub struct BadName(String);

/// Accepts a name that nobody can mistake for a number, an option, a path or "home".
///
/// # Errors
/// [`BadName`].
pub fn check(name: &str) -> Result<&str, BadName> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ok = (1..=MAX_NAME).contains(&name.len())
        && name.chars().all(good)
        && !name.starts_with(['-', '.'])
        && !name.chars().all(|c| c.is_ascii_digit())
        && name != "home";
    if ok {
        Ok(name)
    } else {
        Err(BadName(name.to_string()))
    }
}

/// This machine's host name, shortened to [`MAX_HOST`].
pub fn host() -> String {
    let name = nix::unistd::gethostname()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    name.chars()
        .filter(|c| !c.is_control())
        .take(MAX_HOST / 4)
        .collect()
}

/// A node name made of the host name, for who gave none.
pub fn default_node_name() -> String {
    let host = host();
    let label = host.split('.').next().unwrap_or_default();
    match check(label) {
        Ok(label) => label.to_string(),
        Err(_) => {
            let kept: String = label.chars().filter(|c| c.is_ascii_alphanumeric()).collect();
            format!("node-{kept}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "n2", "2n", "web-1.example", &"x".repeat(63)] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "12", "home", "-x", ".x", "a b", "a/b", "ä", &"x".repeat(64)] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(check(&default_node_name()).is_ok());
    }
}
