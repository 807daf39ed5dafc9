//! Lists: tags, repositories, and manifests about another (distribution specification, "Listing tags", "Listing
//! referrers"). Each comes in pages, the next one in a `Link` header.

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use foreshore_images::manifest::{MANIFEST_BYTES_MAX, OCI_INDEX};
use foreshore_protocol::Digest;
use serde_json::{Value, json};

use super::Keys;
use super::refusal::Refusal;
use crate::api::Api;
use crate::store::{self, StoreError};

/// The most entries of a page, and how many there are unless the client says.
const PAGE_MAX: u64 = 1000;

/// The most referrers of a page; each may bring annotations.
const REFERRERS_MAX: u64 = 200;

/// `GET /v2/NAME/tags/list?n=&last=`, in byte order.
pub(super) async fn tags(api: &Api, name: String, keys: &Keys) -> Result<Response, Refusal> {
    let Page { count, after } = page(keys, PAGE_MAX)?;
    let repository = name.clone();
    let read = api.controller.store().read(move |connection| {
        let tags = store::image::tags(connection, &repository, &after, count + 1)?;
        let known = !tags.is_empty() || store::registry::is_repository(connection, &repository)?;
        Ok::<_, StoreError>(known.then_some(tags))
    });
    let tags = read.await?.ok_or_else(|| {
        Refusal::not_found("NAME_UNKNOWN", format!("the hub has no repository {name}"))
    })?;
    let path = format!("/v2/{name}/tags/list");
    Ok(paged(
        &path,
        tags,
        count,
        |tags| json!({"name": name, "tags": tags}),
    ))
}

/// `GET /v2/_catalog?n=&last=`, in byte order (as Docker's registry has it).
pub(super) async fn catalog(api: &Api, keys: &Keys) -> Result<Response, Refusal> {
    let Page { count, after } = page(keys, PAGE_MAX)?;
    let read = api.controller.store().read(move |connection| {
        let found = store::registry::repositories(connection, &after, count + 1)?;
        Ok::<_, StoreError>(found)
    });
    let repositories = read.await?;
    Ok(paged(
        "/v2/_catalog",
        repositories,
        count,
        |repositories| json!({"repositories": repositories}),
    ))
}

/// `GET /v2/NAME/referrers/DIGEST?artifactType=`: an index, empty when there are none.
pub(super) async fn referrers(
    api: &Api,
    name: String,
    subject: Digest,
    keys: &Keys,
) -> Result<Response, Refusal> {
    let Page { count, after } = page(keys, REFERRERS_MAX)?;
    let kind = keys.get("artifactType").cloned();
    let (repository, wanted) = (name.clone(), kind.clone());
    let read = api.controller.store().read(move |connection| {
        let found = store::registry::referrers(
            connection,
            &repository,
            &subject,
            wanted.as_deref(),
            &after,
            count + 1,
        )?;
        Ok::<_, StoreError>(found)
    });
    let (mut manifests, mut bytes, mut next) = (Vec::new(), 0, None);
    let mut last = None;
    for row in read.await? {
        let mut descriptor = json!({
            "mediaType": row.media_type,
            "digest": row.digest,
            "size": row.size_bytes,
        });
        if let Some(kind) = row.artifact_type {
            descriptor["artifactType"] = kind.into();
        }
        if !row.annotations.is_empty() {
            descriptor["annotations"] = json!(row.annotations);
        }
        bytes += descriptor.to_string().len() as u64;
        // Clients read no more of an index than of a manifest. One entry there is at least, so that pages end.
        let full = manifests.len() as u64 == count || bytes > MANIFEST_BYTES_MAX / 2;
        if full && last.is_some() {
            next = last;
            break;
        }
        last = Some(row.digest.to_string());
        manifests.push(descriptor);
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
    let mut response = ([(header::CONTENT_TYPE, OCI_INDEX)], index.to_string()).into_response();
    let headers = response.headers_mut();
    if kind.is_some() {
        let applied = header::HeaderValue::from_static("artifactType");
        headers.insert("oci-filters-applied", applied);
    }
    if let Some(next) = next {
        let filter = kind
            .map(|kind| format!("artifactType={}&", encoded(&kind)))
            .unwrap_or_default();
        let link =
            format!("</v2/{name}/referrers/{subject}?{filter}n={count}&last={next}>; rel=\"next\"");
        if let Ok(link) = link.parse() {
            headers.insert(header::LINK, link);
        }
    }
    Ok(response)
}

struct Page {
    count: u64,
    after: String,
}

fn page(keys: &Keys, max: u64) -> Result<Page, Refusal> {
    let count = match keys.get("n").map(|text| text.parse::<u64>()) {
        None => max,
        Some(Ok(count)) => count.min(max),
        Some(Err(_)) => {
            return Err(Refusal::bad(
                "UNSUPPORTED",
                "n is the number of entries of a page",
            ));
        }
    };
    Ok(Page {
        count,
        after: keys.get("last").cloned().unwrap_or_default(),
    })
}

/// A page of at most `count` of `items`, of which there is one more when there is another page.
fn paged(
    path: &str,
    mut items: Vec<String>,
    count: u64,
    body: impl FnOnce(&[String]) -> Value,
) -> Response {
    let more = items.len() as u64 > count;
    items.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    let link = items
        .last()
        .filter(|_| more)
        .map(|last| format!("<{path}?n={count}&last={}>; rel=\"next\"", encoded(last)));
    let json = [(header::CONTENT_TYPE, "application/json")];
    let mut response = (json, body(&items).to_string()).into_response();
    if let Some(link) = link.and_then(|link| link.parse().ok()) {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

/// For a query (RFC 3986, section 2).
fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_where_the_next_begins() {
        let items = |count: usize| {
            ["a", "b/c", "d"][..count]
                .iter()
                .map(|item| (*item).to_owned())
                .collect()
        };
        let link = |count, limit| {
            let response = paged("/v2/_catalog", items(count), limit, |items| json!(items));
            response
                .headers()
                .get(header::LINK)
                .map(|link| link.to_str().unwrap().to_owned())
        };
        assert_eq!(link(2, 2), None);
        assert_eq!(
            link(3, 2).unwrap(),
            "</v2/_catalog?n=2&last=b/c>; rel=\"next\""
        );
        assert_eq!(link(1, 0), None);
        assert_eq!(encoded("a b&ü/"), "a%20b%26%C3%BC/");
    }
}
