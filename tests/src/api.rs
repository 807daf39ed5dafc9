//! A small client of the hub's REST API.

use std::time::Duration;

use serde_json::Value;

/// Where a hub's API is, and with which token.
#[derive(Debug, Clone)]
pub struct Api {
    agent: ureq::Agent,
    url: String,
    token: String,
}

/// An answer: its status and its JSON (`Null` when it has none).
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Value,
}

impl Answer {
    /// The body of a success.
    ///
    /// # Panics
    ///
    /// When it is none.
    pub fn ok(self) -> Value {
        assert!(self.status < 300, "status {}: {}", self.status, self.body);
        self.body
    }

    /// The stable code of a problem, empty when it is none.
    #[must_use]
    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }
}

impl Api {
    /// A client for the hub at `url`.
    #[must_use]
    pub fn new(url: &str, token: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(60)))
            .build();
        Self {
            agent: config.into(),
            url: url.to_owned(),
            token: token.to_owned(),
        }
    }

    fn answer(
        result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Answer, ureq::Error> {
        let mut response = result?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string()?;
        Ok(Answer {
            status,
            body: serde_json::from_str(&text).unwrap_or(Value::Null),
        })
    }

    /// GET under `/api/v1`; an error when the hub does not answer.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn try_get(&self, path: &str) -> Result<Answer, ureq::Error> {
        let request = self.agent.get(format!("{}/api/v1{path}", self.url));
        Self::answer(
            request
                .header("authorization", format!("Bearer {}", self.token))
                .call(),
        )
    }

    /// GET under `/api/v1`.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        self.try_get(path)
            .unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// Sends `body` with `method` under `/api/v1`.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/api/v1{path}", self.url))
            .header("authorization", format!("Bearer {}", self.token))
            .header(
                "content-type",
                if method == "PUT" {
                    "application/yaml"
                } else {
                    "application/json"
                },
            )
            .body(body)
            .expect("the request is well-formed");
        Self::answer(self.agent.run(request))
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// What `/metrics` says.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    #[must_use]
    pub fn metrics(&self) -> String {
        let request = self.agent.get(format!("{}/metrics", self.url));
        request
            .header("authorization", format!("Bearer {}", self.token))
            .call()
            .and_then(|mut response| response.body_mut().read_to_string())
            .unwrap_or_else(|error| panic!("GET /metrics: {error}"))
    }

    /// Applies a manifest for `app`.
    pub fn apply(&self, app: &str, manifest: &str) -> Answer {
        self.send("PUT", &format!("/apps/{app}"), manifest.as_bytes())
    }

    /// The newest rollout of an app.
    #[must_use]
    pub fn rollout(&self, app: &str) -> Value {
        self.get(&format!("/rollouts?app={app}")).ok()["items"][0].clone()
    }

    /// What the hub knows of a device.
    #[must_use]
    pub fn device(&self, id: &str) -> Value {
        self.get(&format!("/devices/{id}")).body
    }
}
