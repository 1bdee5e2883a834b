from app.settings import get_settings
from migrations import migrate

migrate(get_settings().database_url.get_secret_value())
