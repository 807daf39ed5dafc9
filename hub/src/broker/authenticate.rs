//! PURE: who a client is. The seam at which client certificates can replace the shared token.

use foreshore_protocol::DeviceId;

use super::authorize::{Action, HUB_NAME, Identity, authorize};
use crate::secrets::Secret;

/// What a client shows when it connects.
#[derive(Clone, Copy)]
pub struct Credentials<'a> {
    /// The session it wants.
    pub client_id: &'a str,
    /// Who it says it is.
    pub user: Option<&'a str>,
    /// What it proves it with.
    pub password: Option<&'a [u8]>,
}

impl std::fmt::Debug for Credentials<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("client_id", &self.client_id)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// Why a client is nobody. Told to the log, never to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No user name or no password.
    #[error("no user name or no password")]
    Anonymous,
    /// The user name can be neither a device nor the hub.
    #[error("the user name is not a device id")]
    UserName,
    /// The wrong password.
    #[error("wrong password")]
    Password,
    /// The client id is not the user name.
    #[error("the client id is not the user name")]
    ClientId,
}

/// Tells who a client is. Cheap and without side effects: it is asked once for every connection.
pub trait Authenticator: Send + Sync + 'static {
    /// Who shows these credentials.
    ///
    /// # Errors
    ///
    /// When they prove nothing.
    fn authenticate(&self, credentials: Credentials<'_>) -> Result<Identity, Refused>;
}

/// One token for all devices, one secret for the hub: whoever holds the join token can be any device.
#[derive(Debug, Clone)]
pub struct SharedToken {
    /// What devices log in with.
    pub join_token: Secret,
    /// What the hub logs in with.
    pub hub_secret: Secret,
}

impl Authenticator for SharedToken {
    fn authenticate(&self, credentials: Credentials<'_>) -> Result<Identity, Refused> {
        let (Some(user), Some(password)) = (credentials.user, credentials.password) else {
            return Err(Refused::Anonymous);
        };
        let (identity, secret) = if user == HUB_NAME {
            (Identity::Hub, &self.hub_secret)
        } else {
            let id: DeviceId = user.parse().map_err(|_| Refused::UserName)?;
            (Identity::Device(id), &self.join_token)
        };
        // `Secret::matches` compares digests, so its time tells nothing of how much was right.
        let right = std::str::from_utf8(password).is_ok_and(|password| secret.matches(password));
        if !right {
            return Err(Refused::Password);
        }
        authorize(&identity, Action::Connect, credentials.client_id)
            .map_err(|_| Refused::ClientId)?;
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(
        client_id: &str,
        user: Option<&str>,
        password: Option<&[u8]>,
    ) -> Result<Identity, Refused> {
        let tokens = SharedToken {
            join_token: Secret::new("join".to_owned()),
            hub_secret: Secret::new("hub".to_owned()),
        };
        tokens.authenticate(Credentials {
            client_id,
            user,
            password,
        })
    }

    #[test]
    fn devices_and_the_hub_are_who_they_prove_to_be() {
        let dev1 = Identity::Device("dev1".parse().unwrap());
        for (client_id, user, password, expected) in [
            ("dev1", Some("dev1"), Some("join"), Ok(dev1)),
            (
                "foreshore-hub",
                Some("foreshore-hub"),
                Some("hub"),
                Ok(Identity::Hub),
            ),
            ("dev1", None, None, Err(Refused::Anonymous)),
            ("dev1", Some("dev1"), None, Err(Refused::Anonymous)),
            ("dev1", None, Some("join"), Err(Refused::Anonymous)),
            ("dev1", Some("dev1"), Some(""), Err(Refused::Password)),
            ("dev1", Some("dev1"), Some("joi"), Err(Refused::Password)),
            ("dev1", Some("dev1"), Some("join "), Err(Refused::Password)),
            // Neither secret opens the other door.
            ("dev1", Some("dev1"), Some("hub"), Err(Refused::Password)),
            (
                "foreshore-hub",
                Some("foreshore-hub"),
                Some("join"),
                Err(Refused::Password),
            ),
            ("dev2", Some("dev1"), Some("join"), Err(Refused::ClientId)),
            ("", Some("dev1"), Some("join"), Err(Refused::ClientId)),
            (
                "foreshore-hub",
                Some("dev1"),
                Some("join"),
                Err(Refused::ClientId),
            ),
            (
                "dev1",
                Some("foreshore-hub"),
                Some("hub"),
                Err(Refused::ClientId),
            ),
            ("DEV1", Some("DEV1"), Some("join"), Err(Refused::UserName)),
            ("a/b", Some("a/b"), Some("join"), Err(Refused::UserName)),
            ("+", Some("+"), Some("join"), Err(Refused::UserName)),
            ("", Some(""), Some("join"), Err(Refused::UserName)),
        ] {
            let answer = ask(client_id, user, password.map(str::as_bytes));
            assert_eq!(answer, expected, "{client_id:?} {user:?} {password:?}");
        }
    }

    #[test]
    fn a_password_that_is_no_text_is_wrong() {
        assert_eq!(
            ask("dev1", Some("dev1"), Some(&[0xff, 0xfe])),
            Err(Refused::Password)
        );
    }

    #[test]
    fn credentials_do_not_print_the_password() {
        let shown = format!(
            "{:?}",
            Credentials {
                client_id: "a",
                user: Some("a"),
                password: Some(b"secret")
            }
        );
        assert!(
            !shown.contains("secret") && !shown.contains("115"),
            "{shown}"
        );
    }
}
