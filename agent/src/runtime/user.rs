//! Who a container runs as: `user[:group]` looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! The rules are Docker's: a number needs no entry; a name does. Without an explicit group the user's own
//! groups apply.

use super::spec::Refusal;

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory; `/` when the image does not say.
    pub home: String,
}

impl User {
    /// Checks that all ids are below `limit`.
    ///
    /// # Errors
    ///
    /// When one is not.
    pub fn fit(&self, limit: u32) -> Result<(), Refusal> {
        let ids = self.groups.iter().chain([&self.uid, &self.gid]);
        ids.copied()
            .find(|id| *id >= limit)
            .map_or(Ok(()), |id| Err(Refusal::IdTooLarge(id, limit)))
    }
}

/// The largest `/etc/passwd` or `/etc/group` that is read, in bytes.
pub const MAX_DATABASE: u64 = 1 << 20;

/// Resolves `text` (`user`, `uid`, `user:group`, `uid:gid`; empty means root) against the contents of the image's
/// passwd(5) and group(5). Lines that do not parse are passed over, as libc does.
///
/// # Errors
///
/// When a name is in neither, or a number is too large.
pub fn resolve(text: &str, passwd: &str, group: &str) -> Result<User, Refusal> {
    let (user_text, group_text) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user_text = if user_text.is_empty() { "0" } else { user_text };
    let number = parse_id(user_text);
    let entry = passwd
        .lines()
        .filter_map(Account::parse)
        .find(|account| match number {
            Some(uid) => account.uid == uid,
            None => account.name == user_text,
        });
    let (uid, own_gid, home, name) = match (entry, number) {
        (Some(account), _) => (account.uid, account.gid, account.home, Some(account.name)),
        (None, Some(uid)) => (uid, 0, "/", None),
        (None, None) => return Err(Refusal::UnknownUser(shorten(user_text))),
    };
    let home = if home.is_empty() { "/" } else { home };
    let gid = match group_text {
        None => own_gid,
        Some(wanted) => match parse_id(wanted) {
            Some(gid) => gid,
            None => group
                .lines()
                .filter_map(parse_group)
                .find(|(group_name, _, _)| *group_name == wanted)
                .map(|(_, gid, _)| gid)
                .ok_or_else(|| Refusal::UnknownGroup(shorten(wanted)))?,
        },
    };
    let mut groups = Vec::new();
    if let (None, Some(name)) = (group_text, name) {
        for (_, member_of, members) in group.lines().filter_map(parse_group) {
            if member_of != gid
                && !groups.contains(&member_of)
                && members.split(',').any(|member| member == name)
            {
                groups.push(member_of);
            }
        }
    }
    // NGROUPS_MAX is 65536; nobody is in so many, and each costs memory.
    groups.truncate(256);
    Ok(User {
        uid,
        gid,
        groups,
        home: home.to_owned(),
    })
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = parse_id(fields.nth(1)?)?;
        let gid = parse_id(fields.next()?)?;
        let home = fields.nth(1).unwrap_or("");
        Some(Self {
            name,
            uid,
            gid,
            home,
        })
    }
}

fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let gid = parse_id(fields.nth(1)?)?;
    Some((name, gid, fields.next().unwrap_or("")))
}

/// A decimal id that chown(2) takes: `u32::MAX` means "leave as it is" there.
fn parse_id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .then(|| text.parse().ok())
        .flatten()
        .filter(|id| *id != u32::MAX)
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                          broken line\n\
                          app:x:1000:1001:App:/srv/app:/bin/sh\n\
                          bare:x:7:7\n";
    const GROUP: &str = "root:x:0:\ndialout:x:20:other,app\ngpio:x:997:app\napp:x:1001:\n";

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> User {
        User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        }
    }

    #[test]
    fn names_and_numbers_resolve_as_in_docker() {
        for (text, expected) in [
            ("", user(0, 0, &[], "/root")),
            ("root", user(0, 0, &[], "/root")),
            ("app", user(1000, 1001, &[20, 997], "/srv/app")),
            ("1000", user(1000, 1001, &[20, 997], "/srv/app")),
            ("app:dialout", user(1000, 20, &[], "/srv/app")),
            ("app:", user(1000, 1001, &[20, 997], "/srv/app")),
            ("12345", user(12345, 0, &[], "/")),
            ("12345:6", user(12345, 6, &[], "/")),
            (":20", user(0, 20, &[], "/root")),
            ("bare", user(7, 7, &[], "/")),
        ] {
            assert_eq!(resolve(text, PASSWD, GROUP).unwrap(), expected, "{text:?}");
        }
    }

    #[test]
    fn what_the_image_does_not_know_is_refused() {
        for text in [
            "nobody",
            "app:nogroup",
            "-1",
            "4294967295",
            "99999999999",
            "a b",
        ] {
            assert!(resolve(text, PASSWD, GROUP).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_image_without_databases_runs_numbers() {
        assert_eq!(resolve("", "", "").unwrap(), user(0, 0, &[], "/"));
        assert_eq!(
            resolve("1000:1000", "", "").unwrap(),
            user(1000, 1000, &[], "/")
        );
    }
}
